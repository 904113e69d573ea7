"""Direction of a metric, judged by its name."""

from __future__ import annotations

import re
from typing import Literal

Mode = Literal["min", "max"]
"""Direction of improvement: the smallest or the largest value is best."""
_SMALL_IS_GOOD = re.compile(
    r"(^|[/_.-])(loss|losses|error|err|rmse|mse|mae|mape|perplexity|ppl|wer|cer|fid|nll|bce)"
    r"($|[/_.-]|\d)"
)
_LARGE_IS_GOOD = re.compile(
    r"(^|[/_.-])(accuracy|acc|top\d|f1|precision|recall|auc|auroc|iou|miou|map|dice|score|reward|"
    r"return|success|psnr|ssim|r2|bleu|kappa)($|[/_.-]|\d)"
)


def guess_mode(name: str) -> Mode | None:
    """Return whether small or large values of a metric are good, judged by its name.

    >>> guess_mode("eval/val/loss"), guess_mode("eval/val/accuracy"), guess_mode("eval/val/x")
    ('min', 'max', None)
    """
    name = name.lower()
    if _LARGE_IS_GOOD.search(name):
        return "max"
    return "min" if _SMALL_IS_GOOD.search(name) else None
