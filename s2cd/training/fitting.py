"""The training loop: AdamW, cosine learning rate, averaged weights, checkpoints."""

from __future__ import annotations

import csv
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from s2cd.model.device import choose_device, fast_bfloat16
from s2cd.training.sampling import Sampler, batch

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """How long and how to train; written into the checkpoint, which only goes on under the same plan.

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


def loss_of(logits: Tensor, truth: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Cross-entropy plus Tversky loss (Salehi et al., 2017) over the batch."""
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    entropy = (entropy * weight).sum() / weight.sum().clamp(min=1)
    p = torch.sigmoid(logits) * weight
    hit, false, missed = (p * truth).sum(), (p * (1 - truth)).sum(), ((weight - p) * truth).sum()
    tversky = 1 - (hit + 1) / (hit + (1 - plan.miss) * false + plan.miss * missed + 1)
    return entropy + plan.overlap * tversky


def fit(
    net: Net, sampler: Sampler, plan: Plan, out: Path, *, device: str = "auto", save_every: float = 60, log: Any = print
) -> Net:
    """Train `net` and return it on the CPU with the averaged weights; goes on from `out`/checkpoint.pt if it is there.

    The curve (step, loss, seconds) goes to `out`/curve.csv. Raises ModelError if the device is not there.
    """
    place = choose_device(device)
    out.mkdir(parents=True, exist_ok=True)
    net.to(place, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # not in torch's stubs
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.rate, weight_decay=plan.decay)
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    step, checkpoint = 0, out / "checkpoint.pt"
    if checkpoint.is_file():
        step = _resume(checkpoint, net, optimizer, average, plan)
    fast = fast_bfloat16(place)
    saved, losses, begin = time.monotonic(), [], time.monotonic()
    while step < plan.steps:
        rng = np.random.default_rng((plan.seed, step))  # so that a resumed run draws what it would have drawn
        before, after, level, truth, weight = (t.to(place) for t in batch(sampler, plan.batch_size, rng))
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _schedule(step, plan.steps)
        with torch.autocast(place.type, torch.bfloat16, enabled=fast):
            logits = net(before, after, level)
        loss = loss_of(logits.float(), truth, weight, plan)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        step += 1
        _update_average(average, net, min(plan.average, step / (step + 10)))
        losses.append(loss.item())
        if step % 50 == 0 or step == plan.steps:
            _log_curve(out / "curve.csv", step, float(np.mean(losses)), time.monotonic() - begin)
            log(f"step {step}/{plan.steps}  loss {np.mean(losses):.4f}  {time.monotonic() - begin:.0f} s")
            losses = []
        if time.monotonic() - saved > save_every or step == plan.steps:
            _save(checkpoint, net, optimizer, average, plan, step)
            saved = time.monotonic()
    net.load_state_dict(average)
    return net.cpu().eval()


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


def _save(path: Path, net: nn.Module, optimizer: Any, average: dict, plan: Plan, step: int) -> None:
    partial = path.with_suffix(".part")
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
    torch.save(state | {"step": step, "plan": vars(plan)}, partial)
    os.replace(partial, path)


def _resume(path: Path, net: nn.Module, optimizer: Any, average: dict, plan: Plan) -> int:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["plan"] != vars(plan):
        raise ValueError(f"{path} was written under another plan, {state['plan']}, expected {vars(plan)}")
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    return int(state["step"])


def _log_curve(path: Path, step: int, loss: float, seconds: float) -> None:
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "loss", "seconds"])
        writer.writerow([step, f"{loss:.5f}", f"{seconds:.1f}"])
