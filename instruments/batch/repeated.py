"""Whether a batch, or single examples of it, were seen before.

Shapes: N = examples of the step, K = examples remembered, W = 64-bit words of one example.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instruments.instrument import Instrument, Output, State, Values
from instruments.objective import Batch, tensors_of
from instruments.refusal import Refusal
from instruments.view import Need, View

Hashes = npt.NDArray[np.int64]
GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number
MIX = (-4658895280553007687, -7723592293110705685)
WORDS = 2**21


@dataclass(frozen=True)
class Repeated(Instrument):
    """Hashes of the examples of the batch against those of earlier batches.

    An example is the bits of everything that belongs to it in the batch, targets included; its 64-bit hash is the sum
    of its mixed words (splitmix64 of word + position), and the hash of the batch is the sum of the mixed hashes, so
    the order of the examples does not matter. Two different examples share a hash with a chance of 2^-64.

    The same batch again and again is a loader that does not advance, or a test that was left in. Examples return after
    one epoch in healthy training: then `example_gap` is about the steps of an epoch and `share` goes to 1, as long as
    the memory is not shorter than the epoch; a gap much shorter than an epoch is drawing with replacement, a sampler
    that is seeded alike in every worker, or a data set that holds duplicates. Random augmentation changes the bits and
    hides repetition. `duplicates` are examples that stand twice in one step.

    Only batches that were read are remembered: read it at every step. Memory: the most recent `batches` and `examples`,
    at 16 bytes each. Examples are told apart where all tensors of the batch have the same leading dimension; otherwise
    the batch is one, and what is said of examples is NaN. Hashing runs on the batch's device and sends one number an
    example and tensor to the host: about 10 ns a word of 8 bytes on one CPU core.
    """

    batches: int = 1024
    examples: int = 65536

    outputs: ClassVar[Mapping[str, Output]] = {
        "repeated": Output("1", "1 if the same examples, in any order, were a batch before, else 0", edge=1.0),
        "steps_since": Output("steps", "steps since that batch was last seen; NaN if it was not"),
        "share": Output("1", "share of the examples that were in an earlier batch"),
        "example_gap": Output("steps", "median steps since these examples were last seen; NaN without any"),
        "duplicates": Output("1", "share of the examples that stand in this step a second time"),
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"batch"})
    reference: ClassVar[str] = "Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators: the mixing"

    def __post_init__(self) -> None:
        if self.batches < 1 or self.examples < 1:
            raise ValueError(
                f"expected batches >= 1 and examples >= 1 to remember, got {self.batches} and {self.examples}."
            )

    def price(self, view: View) -> float:
        return 0.02

    def init(self) -> State:
        empty = torch.zeros(0, dtype=torch.int64)
        return {"batches": empty, "batch_steps": empty, "examples": empty, "example_steps": empty}

    def advance(self, view: View, state: State) -> tuple[Values, State]:
        if not all(map(tensors_of, view.batches)):
            raise Refusal("expected tensors in the batch, saw none; there is nothing to compare.")
        apart = all(map(_has_examples, view.batches))
        hashes = [_example_hashes(batch) if apart else _whole_hash(batch) for batch in view.batches]
        hash_N = torch.cat(hashes)
        batch_1 = _mixed(hash_N).sum(0, keepdim=True)
        _, gap_1, batches = _recall(batch_1, view.step, state["batches"], state["batch_steps"], self.batches)
        values = {"repeated": float(len(gap_1)), "steps_since": float(gap_1[0]) if len(gap_1) else math.nan}
        new = {"batches": batches[0], "batch_steps": batches[1]}
        if not apart:
            kept = {key: state[key] for key in ("examples", "example_steps")}
            return {**values, "share": math.nan, "example_gap": math.nan, "duplicates": math.nan}, {**new, **kept}
        twice, gaps, examples = _recall(hash_N, view.step, state["examples"], state["example_steps"], self.examples)
        values |= {
            "share": len(gaps) / len(hash_N),
            "example_gap": float(np.median(gaps)) if len(gaps) else math.nan,
            "duplicates": twice / len(hash_N),
        }
        return values, {**new, "examples": examples[0], "example_steps": examples[1]}


def _has_examples(batch: Batch) -> bool:
    """Whether all tensors have the same leading dimension."""
    leading = {t.shape[:1] for t in tensors_of(batch)}
    return len(leading) == 1 and torch.Size() not in leading


def _recall(
    hash_N: Tensor, step: int, known_K: Tensor, steps_K: Tensor, room: int
) -> tuple[int, Hashes, tuple[Tensor, Tensor]]:
    """Second occurrences within N, the steps since each known one was last seen, and the memory with them in it.

    The memory is kept in ascending order of the hashes; the ones not seen for longest are forgotten.
    """
    own, counts = np.unique(hash_N.numpy(), return_counts=True)
    known, steps = known_K.cpu().numpy(), steps_K.cpu().numpy().copy()
    at = np.searchsorted(known, own)
    hit = np.zeros(len(own), dtype=bool)
    hit[at < len(known)] = known[at[at < len(known)]] == own[at < len(known)]
    gaps = np.repeat(step - steps[at[hit]], counts[hit])
    steps[at[hit]] = step
    known, steps = np.insert(known, at[~hit], own[~hit]), np.insert(steps, at[~hit], step)
    if len(known) > room:
        kept = np.sort(np.argsort(-steps, kind="stable")[:room])
        known, steps = known[kept], steps[kept]
    return len(hash_N) - len(own), gaps, (torch.from_numpy(known), torch.from_numpy(steps))


def _example_hashes(batch: Batch) -> Tensor:
    """(N,): one hash an example, over all tensors of the batch in their order."""
    fields = [t.detach().flatten(1) if t.ndim > 1 else t.detach()[:, None] for t in tensors_of(batch)]
    total = torch.zeros(len(fields[0]), dtype=torch.int64)
    for x_NF in fields:
        total = _mixed(total + 1) + _row_hashes(x_NF).cpu()
    return _mixed(total)


def _whole_hash(batch: Batch) -> Tensor:
    """(1,): one hash of all tensors, where no leading dimension says what an example is."""
    total = torch.zeros(1, dtype=torch.int64)
    for t in tensors_of(batch):
        total = _mixed(total + t.numel()) + _row_hashes(t.detach().reshape(1, -1)).cpu()
    return _mixed(total)


def _row_hashes(x_NF: Tensor) -> Tensor:
    """(N,): a hash of the bits of each row, in pieces of rows so that little memory is needed."""
    if x_NF.layout is not torch.strided or x_NF.is_nested:
        raise Refusal("sparse and nested tensors are not hashed; pass the batch with dense tensors.")
    bits_NB = x_NF.contiguous().view(torch.uint8).flatten(1)
    missing = -bits_NB.shape[1] % 8
    rows = max(1, WORDS * 8 // max(1, bits_NB.shape[1]))
    return torch.cat(
        [_sum_of_words(torch.nn.functional.pad(part, (0, missing))) for part in torch.split(bits_NB, rows)]
    )


def _sum_of_words(bits_NB: Tensor) -> Tensor:
    words_NW = bits_NB.contiguous().view(torch.int64)
    place_W = torch.arange(1, words_NW.shape[1] + 1, device=words_NW.device) * GOLDEN
    return _mixed(words_NW + place_W).sum(1)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser in signed arithmetic that wraps; the shifts are logical."""
    for factor, shift in zip(MIX, (30, 27), strict=True):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)
