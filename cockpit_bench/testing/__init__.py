"""For tests of instruments, yours and ours: does an instrument keep to what a cockpit promises its users?

    from cockpit_bench.testing import check_instrument

    def test_it_conforms():
        refusals = check_instrument(MyInstrument())
        assert refusals.keys() == {"one number"}

`check_instrument` trains about twenty tiny models (`COVERING_CASES`) with the instrument at every step and raises
AssertionError with all that is wrong. Cases of your own are `Case(name, model, batch, optimizers, loss)`.
"""

from cockpit_bench.testing.cases import COVERING_CASES as COVERING_CASES
from cockpit_bench.testing.conformance import check_instrument as check_instrument
from cockpit_bench.testing.training import Case as Case
