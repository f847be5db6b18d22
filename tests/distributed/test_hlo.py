"""Reading the text of compiled programs, against texts whose meaning is known."""

import pytest

from llama4_eqx.distributed.hlo import read_hlo

LOOP = """
%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %x = f32[8]{0:T(256)} get-tuple-element(%b), index=1
  %y = f32[8]{0:T(256)S(1)} negate(%x)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12), metadata={op_name="f"}
  %c = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, LIMIT), direction=LT
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%p), condition=%condition, body=%body
}"""


@pytest.mark.parametrize(("limit", "times"), [("%limit", 12), ("%i", None)])
def test_how_often_a_loop_runs_on_a_tpu(limit, times):
    """Its text says it only by the constant in the condition."""
    executed = read_hlo(LOOP.replace("LIMIT", limit)).executed()
    found = {instruction.name: count for instruction, _, count in executed}
    assert found["y"] == found["x"] == times
    assert found["loop"] == found["p"] == 1


def test_where_an_array_is_and_how_large_with_its_tiles():
    """Tiles of 8 × 128, of which two rows of 16 bits share one; minor axes come first."""
    text = """ENTRY %main (p: f32[4]) -> f32[4] {
  %a = bf16[5,300]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[5,300]{0,1:T(8,128)(2,1)S(1)} parameter(1)
  %c = f32[5,300]{1,0} parameter(2)
  %d = s4[64]{0:T(1024)E(4)} parameter(3)
  ROOT %t = (f32[2]{0}, pred[3]{0}) tuple(%a, %b)
}"""
    program = read_hlo(text)
    arrays = {name: one.results for name, one in program.computations[program.entry].items()}
    assert [one.size for one in arrays["a"]] == [8 * 384 * 2]
    assert [(one.size, one.on_chip) for one in arrays["b"]] == [(128 * 304 * 2, True)]
    assert [(one.size, one.on_chip) for one in arrays["c"]] == [(5 * 300 * 4, False)]
    assert [one.size for one in arrays["d"]] == [1024 // 2]
    assert [one.size for one in arrays["t"]] == [8, 3]
    assert program.computations["main"]["t"].operands == ("a", "b")


def test_what_is_not_hlo():
    with pytest.raises(ValueError, match="isn't compiled HLO"):
        read_hlo("module {}")
