"""Training: one plain resumable loop that knows a module, a loss of a batch, and batches by index."""

from .batches import Batches as Batches
from .batches import Draw as Draw
from .batches import EpochOrder as EpochOrder
from .checkpoint import CheckpointError as CheckpointError
from .checkpoint import load_weights as load_weights
from .checkpoint import save_weights as save_weights
from .config import TrainConfig as TrainConfig
from .distributed import first_process as first_process
from .distributed import synced_batch_norm as synced_batch_norm
from .folder import RunFolderError as RunFolderError
from .folder import find_weights as find_weights
from .folder import started as started
from .interruption import Interrupted as Interrupted
from .loop import Loss as Loss
from .loop import TrainResult as TrainResult
from .loop import train as train
from .nonfinite import NonFiniteError as NonFiniteError
