"""Data that breaks careless arithmetic: heavy ties, zeros of both signs, denormals, huge values."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def generator(*seed: int) -> torch.Generator:
    """A generator for a tuple of small integers."""
    return torch.Generator().manual_seed(hash(seed) % 2**63)


def quantised_models(
    count: int, models: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and fine-tunes whose task vectors take few distinct magnitudes, as those of real bf16 models do.

    Several of them equal the base or its mirror image in places, so that votes tie and cancel exactly.
    """
    g = generator(count, models, seed)
    base = (torch.randn(count, generator=g) * 0.02).to(torch.bfloat16)
    tuned = []
    for _ in range(models):
        step = torch.randint(-6, 7, (count,), generator=g).float() * 2.0**-11
        step[torch.rand(count, generator=g) < 0.3] = 0
        tuned.append((base.float() + step).to(torch.bfloat16))
    if models > 1:
        tuned[1] = torch.where(torch.rand(count, generator=g) < 0.3, 2 * base - tuned[0], tuned[1])
    return base.to(dtype), [x.to(dtype) for x in tuned]


def extreme_models(count: int, models: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Random finite bit patterns, denormals and signed zeros included; task vectors may overflow."""
    g = generator(count, models, 99)
    info = torch.finfo(dtype)
    special = torch.tensor(
        [0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal / 4, info.max / 4, -info.max / 4, 1.0, -1.0],
        dtype=dtype,
    )
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[info.bits // 8]

    def draw() -> torch.Tensor:
        bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (count,), generator=g)
        values = bits.to(integer).view(dtype)
        values = torch.where(
            values.isfinite() & (values.abs() < info.max / 4), values, torch.ones((), dtype=dtype)
        )
        pick = special[torch.randint(0, len(special), (count,), generator=g)]
        return torch.where(torch.rand(count, generator=g) < 0.4, pick, values)

    return draw(), [draw() for _ in range(models)]
