"""CLEVR: the released formats, and a generated world written in them."""
