"""What a train record says to a person: its line in the log, and the guide's warning signs with their remedies.

Keys and units of a record are in `metrics.py`.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Sign = Literal["ok", "warning", "bad"]


def format_train_line(iteration: int, max_iters: int, values: Mapping[str, Any]) -> str:
    """One train record for people; a part whose key is missing is left out.

    `iter 120/400 | loss 4.213 | lr 2.9e-04 | grad 0.83 | router_aux 0.0003 ok | 11.2K tok/s | mfu 12.3% | …`
    """
    forms = {
        "loss": lambda v: f"loss {v:.3f}",
        "lr": lambda v: f"lr {v:.1e}",
        "grad_norm": lambda v: f"grad {v:.2f}",
        "router_aux": lambda v: f"router_aux {v:.2g} {router_sign(v)}",
        "tokens_per_second": lambda v: f"{short_number(v)} tok/s",
        "mfu": lambda v: f"mfu {v:.1%}",
        "data_wait": lambda v: f"data {v:.1%}",
        "memory": lambda v: f"mem {v / 1e9:.1f} GB",
        "eta": lambda v: f"eta {format_seconds(v)}",
    }
    parts = [form(values[key]) for key, form in forms.items() if values.get(key) is not None]
    return " | ".join([f"iter {iteration}/{max_iters}", *parts])


def format_seconds(seconds: float) -> str:
    """`8s`, `1m32s`, `2h05m`, `3d04h`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def short_number(number: float) -> str:
    """Three digits and a unit: 940, 11.2K, 1.85M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:  # so that 999.9 becomes 1K, not 1e+03
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


class WarningSigns:
    """Watches the train records of one run and says when one of the guide's warning signs appears.

    A sign is reported when it appears or gets worse, not at every line while it lasts; NaN and infinity always are.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=20)
        self._grad_norms: deque[float] = deque(maxlen=10)
        self._rates: deque[float] = deque(maxlen=50)
        self._rates_to_skip = 2  # the first log lines hold compilation and the allocator's warm-up
        self._last: dict[str, Sign] = {}

    def check(self, values: Mapping[str, Any]) -> list[str]:
        """The warnings that one train record calls for, each a line with its remedy; keys as in `metrics.py`.

        All keys are optional. For the cause of a throughput drop: `seconds` since the last log line and, of these,
        `data_wait_seconds`, `eval_seconds`, `save_seconds` and `sample_seconds`.
        """
        warnings = [
            self._check_loss(values.get("loss")),
            self._check_grad_norm(values.get("grad_norm")),
            self._check_router(values.get("router_aux")),
            self._check_rate(values),
        ]
        return [warning for warning in warnings if warning]

    def _appeared(self, name: str, sign: Sign) -> bool:
        order = ("ok", "warning", "bad")
        worse = order.index(sign) > order.index(self._last.get(name, "ok"))
        self._last[name] = sign
        return worse

    def _check_loss(self, loss: float | None) -> str | None:
        if loss is None:
            return None
        if not math.isfinite(loss):
            return f"loss is {loss}: lower --lr or --grad_clip"
        spike, usual = is_loss_spike(loss, self._losses), statistics.fmean(self._losses or [loss])
        self._losses.append(loss)
        if not self._appeared("loss", "warning" if spike else "ok"):
            return None
        return (
            f"loss {loss:.3f} jumped above its running mean {usual:.3f}: "
            "if it stays there, lower --lr (or --router_aux_coef where the router is not ok)"
        )

    def _check_grad_norm(self, norm: float | None) -> str | None:
        if norm is None:
            return None
        self._grad_norms.append(norm)
        sign = grad_sign(self._grad_norms)
        if sign == "bad":
            return f"gradient norm is {norm}: lower --lr or --grad_clip"
        if not self._appeared("grad_norm", sign):
            return None
        high = sum(n > 2.0 for n in self._grad_norms)
        return (
            f"gradient norm above 2.0 in {high} of the last {len(self._grad_norms)} log lines: lower --lr if it stays"
        )

    def _check_router(self, aux: float | None) -> str | None:
        if aux is None or not self._appeared("router", sign := router_sign(aux)):
            return None
        return f"router aux loss {aux:.2g} is {sign}: " + (
            "the experts are unevenly used (good is below 0.001)"
            if sign == "warning"
            else "the router is unstable (above 0.01); see balance_per_layer and --router_aux_coef"
        )

    def _check_rate(self, values: Mapping[str, Any]) -> str | None:
        rate = values.get("tokens_per_second")
        if rate is None:
            return None
        if self._rates_to_skip:
            self._rates_to_skip -= 1
            return None
        usual = statistics.median(self._rates) if len(self._rates) >= 5 else rate
        self._rates.append(rate)
        if not self._appeared("rate", "warning" if rate < 0.7 * usual else "ok"):
            return None
        fall = f"{short_number(rate)} tok/s, {rate / usual:.0%} of the usual {short_number(usual)}"
        return f"throughput fell to {fall}: {drop_cause(values, usual)}"


def router_sign(aux: float) -> Sign:
    """The guide's reading of the router aux loss: ok below 0.001, warning up to 0.01, bad above (and for NaN)."""
    if aux < 0.001:
        return "ok"
    return "warning" if aux <= 0.01 else "bad"


def grad_sign(norms: Sequence[float]) -> Sign:
    """The guide's reading of the last logged gradient norms: bad if the newest is NaN or infinite, warning if at
    least three of the last ten are above 2.0."""
    if not math.isfinite(norms[-1]):
        return "bad"
    return "warning" if sum(norm > 2.0 for norm in list(norms)[-10:]) >= 3 else "ok"


def is_loss_spike(loss: float, history: Sequence[float]) -> bool:
    """Whether a loss is above the mean of the earlier ones by more than 0.5 nats and four standard deviations.

    With fewer than five earlier losses nothing is a spike.
    """
    if len(history) < 5:
        return False
    return loss > statistics.fmean(history) + max(0.5, 4 * statistics.pstdev(history))


def drop_cause(values: Mapping[str, Any], usual_rate: float) -> str:
    """What a slow log line was spent on: the largest of waiting for data, evaluation, saving and sampling if it
    explains at least half of the time lost against the usual rate, else the training step itself."""
    names = {
        "data_wait_seconds": "waiting for data",
        "eval_seconds": "evaluation",
        "save_seconds": "saving",
        "sample_seconds": "sampling",
    }
    key = max(names, key=lambda k: values.get(k) or 0.0)
    longest, seconds = values.get(key) or 0.0, values.get("seconds") or 0.0
    lost = seconds * (1 - values["tokens_per_second"] / usual_rate)
    if longest == 0 or longest < lost / 2:
        return "the step itself"
    return f"{names[key]} took {longest:.1f} s since the last log line"
