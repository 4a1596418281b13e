"""The conformance suite: what every instrument must keep to, checked on the covering set of cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cockpit_bench.testing.cases import COVERING_CASES
from cockpit_bench.testing.divergences import DIVERGENCES, LEFT_ALONE, Meddling
from cockpit_bench.testing.runs import SAVED_AT, STEPS, Named, Watched, plain_run, resumed_run, watched_run
from cockpit_bench.testing.traces import differences
from cockpit_bench.testing.training import Case
from instruments.instrument import Instrument
from instruments.needs import CURVATURES, RUNS_MODEL, SAMPLES

PRICED_ON = 3  # cases
CURVATURE_READINGS = 20  # that a price is the mean of: products are saved by what earlier readings found
NEARLY_FREE = 0.5  # g, for what does not run the model


@dataclass(frozen=True)
class Examination:
    """What was found of several instruments on one case: faults and refusals, by label."""

    faults: Mapping[str, Sequence[str]]
    refusals: Mapping[str, str]


def check_instrument(instrument: Instrument, cases: Sequence[Case] = COVERING_CASES) -> dict[str, str]:
    """Train every case with this instrument at every step, and raise AssertionError with all that is wrong with it.

    Checked are: training goes on bit for bit as without it (parameters, gradients, buffers, optimizer state, random
    streams, modes, hooks, attributes); values are as declared; two runs agree; a run that was saved, loaded and gone on
    with agrees with one that never stopped; nothing but Refusal is raised, also where training diverges; every need is
    used; the declared price is within a factor of two of what was counted.

    Returns the reasons of refusals by the name of the case, for the test to compare with what it expects. An
    instrument that refuses all cases cannot be checked, and that is an AssertionError too.
    """
    name = type(instrument).__name__
    faults: list[str] = []
    refusals: dict[str, str] = {}
    for case in cases:
        found = examine({name: instrument}, case)
        faults += [f"{case.name}: {fault}" for fault in found.faults.get(name, ())]
        if name in found.refusals:
            refusals[case.name] = found.refusals[name]
    read = [case for case in cases if case.name not in refusals]
    if not read:
        reasons = sorted(set(refusals.values()))
        raise AssertionError(f"{name} reads none of the cases, so that nothing can be checked: {'; '.join(reasons)}")
    if not faults:
        faults = examine_alone(instrument, read)
        broken = examine_divergence({name: instrument}, read[0])
        faults += [f"{read[0].name}: {fault}" for fault in broken.get(name, ())]
    if faults:
        raise AssertionError(f"{name} does not conform:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return refusals


def examine(instruments: Named, case: Case) -> Examination:
    """All of them at once on one case; whoever is at fault is named, by bisecting where that is not seen directly."""
    plain = plain_run(case)
    whole, resumed = watched_run(case, instruments), resumed_run(case, instruments)
    faults = _testified(instruments, whole, resumed)
    if not any(faults.values()) and (where := differences(plain, whole.traces)):
        culprit = _bisect(instruments, case)
        faults[culprit].append(f"training is another one with it, at {', '.join(where[:3])}")
    for label in instruments:
        if not faults[label] and (said := _first_difference(whole.essence(label), resumed.essence(label))):
            faults[label].append(said)
    refusals = {label: seen.refusal for label, seen in whole.seen.items() if seen.refusal is not None}
    return Examination({label: found for label, found in faults.items() if found}, refusals)


def examine_alone(instrument: Instrument, cases: Sequence[Case]) -> list[str]:
    """What cannot be seen among others, who share what they need: needs that are not used, and the price."""
    return _superfluous_needs(instrument, cases) + _wrong_prices(instrument, cases[:PRICED_ON])


def examine_divergence(instruments: Named, case: Case) -> dict[str, list[str]]:
    """Parameters, gradients, inputs or losses become NaN or infinite: observed to the end, and nothing is changed."""
    faults: dict[str, list[str]] = {}
    for kind, meddling in DIVERGENCES.items():
        run = watched_run(case, instruments, meddling=meddling)
        for label, seen in run.seen.items():
            faults.setdefault(label, []).extend(f"{kind}: {fault}" for fault in seen.faults)
        broken = [event for event in run.events if event.name == "observe_failed"]
        if broken or differences(plain_run(case, meddling), run.traces):
            culprit = _bisect(instruments, case, meddling)
            said = broken[0].detail["reason"] if broken else "training is another one with it"
            faults[culprit].append(f"{kind}: {said}")
    return {label: found for label, found in faults.items() if found}


def _testified(instruments: Named, *runs: Watched) -> dict[str, list[str]]:
    """What the witnesses saw, and failures that came to pass outside of a reading (in `price`, in logging)."""
    faults: dict[str, list[str]] = {}
    for label in instruments:
        found = [fault for run in runs for fault in run.seen[label].faults]
        for run in runs:
            refused = run.seen[label].refusal
            failed = [r.reason for r in run.readings if (r.instrument, r.status) == (label, "failed")]
            found += [f"fails: {reason}" for reason in failed if refused is None and not found]
        faults[label] = list(dict.fromkeys(found))
    return faults


def _bisect(instruments: Named, case: Case, meddling: Meddling = LEFT_ALONE) -> str:
    """The one of several that changes training or breaks the observation, in as many runs as they can be halved."""
    plain, labels = plain_run(case, meddling), list(instruments)
    while len(labels) > 1:
        half = labels[: len(labels) // 2]
        run = watched_run(case, {label: instruments[label] for label in half}, meddling=meddling)
        broken = any(event.name == "observe_failed" for event in run.events)
        labels = half if broken or differences(plain, run.traces) else labels[len(labels) // 2 :]
    return labels[0]


def _first_difference(one: Sequence[tuple[int, str]], other: Sequence[tuple[int, str]]) -> str:
    if one == other:
        return ""
    for (step, said), (_, again) in zip(one, other, strict=False):
        if said != again:
            what = "two runs from one seed differ" if step < SAVED_AT else "after saving and loading it reads otherwise"
            return f"{what}, at step {step}: {said[:200]} and {again[:200]}"
    return f"{len(one)} readings without, {len(other)} with saving and loading on the way"


def _superfluous_needs(instrument: Instrument, cases: Sequence[Case]) -> list[str]:
    """Without any one of its needs some reading must fail or come out differently."""
    name = type(instrument).__name__
    found = []
    for need in sorted(instrument.needs):
        if need == "samples" and instrument.needs & SAMPLES - {"samples"}:
            continue  # whatever else is asked of the moments stands for it
        rest = instrument.needs - {need}
        for case in cases:
            with_all, without = watched_run(case, {name: instrument}), watched_run(case, {name: instrument}, needs=rest)
            if _said(with_all, name) != _said(without, name):
                break
        else:
            found.append(f"declares the need '{need}' and does not use it")
    return found


def _said(run: Watched, label: str) -> list[str]:
    return [str([r.status, sorted(r.values.items(), key=str)]) for r in run.readings if r.instrument == label]


def _wrong_prices(instrument: Instrument, cases: Sequence[Case]) -> list[str]:
    """What was counted is the mean over the readings of a short run, with the batches of curvature fixed."""
    name = type(instrument).__name__
    found = []
    follows = instrument.needs & CURVATURES and instrument.init()
    steps = CURVATURE_READINGS if follows else STEPS
    for case in cases:
        held = [case.batch(micro) for micro in range(case.accumulate)]
        seen = watched_run(case, {name: instrument}, probe=held, steps=steps).seen[name]
        counted, declared = fmean(seen.counted), fmean(seen.declared)
        if counted == 0 and not instrument.needs & RUNS_MODEL:
            wrong = not 0 <= declared <= NEARLY_FREE
        else:
            wrong = not counted / 2 <= declared <= counted * 2
        if wrong:
            found.append(f"{case.name}: declares a price of {declared:.3g} g; {counted:.3g} g were counted")
    return found
