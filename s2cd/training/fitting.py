"""The training loop: AdamW, cosine learning rate, averaged weights, checkpoints."""

from __future__ import annotations

import csv
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from s2cd.errors import ConfigError, ModelError
from s2cd.interrupts import noted_interrupts
from s2cd.model.device import choose_device, fast_bfloat16
from s2cd.training.folders import made, written
from s2cd.training.sampling import Sampler, batch

EXPLODED = 1e6  # no weight of a network that works is as large
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """How long and how to train.

    steps, batch_size, rate, decay   of AdamW; the learning rate warms up and falls as a cosine
    average                          decay of the exponential average of the weights
    overlap                          weight of the Tversky loss beside the cross-entropy
    miss                             weight of a missed pixel in the Tversky loss; a false alarm weighs 1 - miss
    """

    steps: int = 1500
    batch_size: int = 8
    rate: float = 3e-3
    decay: float = 1e-2
    average: float = 0.995
    overlap: float = 1.0
    miss: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for a rate that is none."""
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"rate: found {self.rate:g}, expected a positive number")


def loss_of(logits: Tensor, truth: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Cross-entropy plus Tversky loss (Salehi et al., 2017) over the batch."""
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    entropy = (entropy * weight).sum() / weight.sum().clamp(min=1)
    p = torch.sigmoid(logits) * weight
    hit, false, missed = (p * truth).sum(), (p * (1 - truth)).sum(), ((weight - p) * truth).sum()
    tversky = 1 - (hit + 1) / (hit + (1 - plan.miss) * false + plan.miss * missed + 1)
    return entropy + plan.overlap * tversky


def fit(
    net: Net,
    sampler: Sampler,
    plan: Plan,
    out: Path,
    description: Mapping[str, Any],
    *,
    device: str = "auto",
    save_every: float = 60,
    log: Any = print,
) -> Net:
    """Train `net` and return it on the CPU with the averaged weights; goes on from `out`/checkpoint.pt if it is there.

    `description`, of plain JSON types, tells all that decides the weights: a checkpoint of another is refused.
    The curve (step, loss, seconds) goes to `out`/curve.csv, and goes on there from the checkpoint. An interrupt ends it
    after the step, whose checkpoint is written.

    Raises ModelError if the device is not there, the checkpoint is damaged or the loss is not finite; ConfigError for a
    checkpoint of another description; OutputError for `out`.
    """
    place = choose_device(device)
    made(out)
    net.to(place, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # not in torch's stubs
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.rate, weight_decay=plan.decay)
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    step, checkpoint, curve = 0, out / "checkpoint.pt", out / "curve.csv"
    if checkpoint.is_file():
        step = _resume(checkpoint, net, optimizer, average, description)
    begin = time.monotonic() - _cut_curve(curve, step)
    fast = fast_bfloat16(place)
    saved, losses = time.monotonic(), []
    interrupted = threading.Event()
    with noted_interrupts(interrupted):
        while step < plan.steps:
            rng = np.random.default_rng((plan.seed, step))  # so that a resumed run draws what it would have drawn
            before, after, level, truth, weight = (t.to(place) for t in batch(sampler, plan.batch_size, rng))
            torch.manual_seed(int(rng.integers(2**63)))  # of dropout, for the same reason
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * _schedule(step, plan.steps)
            with torch.autocast(place.type, torch.bfloat16, enabled=fast):
                logits = net(before, after, level)
            loss = loss_of(logits.float(), truth, weight, plan)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise _diverged(out, step, plan)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            step += 1
            _update_average(average, net, min(plan.average, step / (step + 10)))
            if step % 50 == 0 or step == plan.steps:
                _log_curve(curve, step, float(np.mean(losses)), time.monotonic() - begin)
                log(f"step {step}/{plan.steps}  loss {np.mean(losses):.4f}  {time.monotonic() - begin:.0f} s")
                losses = []
            if time.monotonic() - saved > save_every or step == plan.steps or interrupted.is_set():
                weights = (value for value in average.values() if value.is_floating_point())
                if not all((value.abs() < EXPLODED).all() for value in weights):  # so are NaN and infinity
                    raise _diverged(out, step, plan)
                _save(checkpoint, net, optimizer, average, description, step)
                saved = time.monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt
    net.load_state_dict(average)
    return net.cpu().eval()


def require_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the description `found` at `path` is of the training `expected`."""
    found, expected = ({**d, **d.get("plan", {})} for d in (found, expected))
    aside = {"plan"}
    if found.get("start_sha256") == expected.get("start_sha256"):
        aside.add("start")  # the same weights, whatever they are called
    differ = [f"{k} {found.get(k)}, expected {v}" for k, v in expected.items() if k not in aside and found.get(k) != v]
    if differ:
        raise ConfigError(f"{path} is of another training, choose another folder: found {'; '.join(differ)}")


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(100, max(1, steps // 10)))
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def _update_average(average: dict[str, Tensor], net: nn.Module, decay: float) -> None:
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _diverged(out: Path, step: int, plan: Plan) -> ModelError:
    return ModelError(f"{out}: diverged by step {step}, expected a finite loss: try a lower rate than {plan.rate:g}")


def _save(path: Path, net: nn.Module, optimizer: Any, average: dict, description: Mapping[str, Any], step: int) -> None:
    partial = path.with_suffix(".part")
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
    with written(path):
        torch.save(state | {"step": step, "description": dict(description)}, partial)
        os.replace(partial, path)


def _resume(path: Path, net: nn.Module, optimizer: Any, average: dict, description: Mapping[str, Any]) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: cannot be read, delete it to begin again: {reason}") from None
    if not isinstance(state, dict) or "description" not in state:
        raise ModelError(f"{path}: found no description, as of an earlier version; delete it to begin again")
    require_same(path, state["description"], description)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    return int(state["step"])


def _cut_curve(path: Path, step: int) -> float:
    """Leave the rows of a curve up to `step` and return the seconds of the last one, 0 without."""
    with written(path):
        text = path.read_text(errors="replace") if path.exists() else ""
        rows = [row for row in re.findall(r"^(\d+),(\S+),(\d+\.\d)$", text, re.MULTILINE) if int(row[0]) <= step]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss", "seconds"), *rows])
    return float(rows[-1][2]) if rows else 0.0


def _log_curve(path: Path, step: int, loss: float, seconds: float) -> None:
    with written(path), path.open("a", newline="") as file:
        csv.writer(file).writerow([step, f"{loss:.5f}", f"{seconds:.1f}"])
