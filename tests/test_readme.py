"""What README shows runs."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_of_the_kernels_in_pytorch():
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "leantune_kernels" in block]
    names: dict = {}
    exec(example, names)
    assert names["loss"].isfinite() and names["B"].detach().count_nonzero() > 0
