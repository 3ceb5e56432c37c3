"""Read a CLEVR folder, ours or the released one: its questions by type, and its programs run again.

Without a folder a small one is generated first. Released folders: CLEVR_v1.0, CLEVR_CoGenT_v1.0.

    python examples/read_clevr.py [FOLDER [SPLIT]]
"""

import sys
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

from torchfilm.data.clevr.executor import execute
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.data.clevr.generate import generate_dataset


def report(folder: ClevrFolder, split: str, limit: int = 2000) -> None:
    scenes = {s["image_index"]: s for s in islice(folder.scenes(split), limit)}
    asked = [q for q in islice(folder.questions(split), limit) if q["image_index"] in scenes]
    for kind, number in Counter(q["program"][-1]["function"] for q in asked).most_common():
        print(f"{number:6}  {kind}")
    agree = sum(execute(q["program"], scenes[q["image_index"]]) == q["answer"] for q in asked)
    print(f"{agree} of {len(asked)} programs give the answer in the file")
    print(f"{asked[0]['question']}  {asked[0]['answer']}")


def main() -> None:
    if sys.argv[1:]:
        root, split = Path(sys.argv[1]), (sys.argv[2:] or ["val"])[0]
        report(ClevrFolder(root), split)
        return
    with tempfile.TemporaryDirectory() as place:
        generate_dataset(place, "val", num_scenes=6, seed=1, workers=1)
        report(ClevrFolder(Path(place)), "val")


if __name__ == "__main__":
    main()
