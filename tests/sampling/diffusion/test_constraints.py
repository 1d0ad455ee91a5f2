"""Constraints against brute force: every filling of every canvas is written out and asked of Python's own `re`.

Shapes: B rows, L positions, V vocabulary with the mask, N fillings.
"""

from __future__ import annotations

import itertools
import re
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlm.errors import InputError
from dlm.sampling.diffusion.constraints import AllowedTokens, Pattern, both
from dlm.sampling.diffusion.protocols import Constraint
from dlm.spelling import Part, Spelling

pytest.importorskip("interegular")

PIECES = {0: "a", 1: "b", 2: "ab", 3: "ba.", 4: ""}  # 4 has no text, 5 is the mask
V, MASK = 6, 5
REGEXES = [
    "a*",
    "(a|b)*",
    "a(b|ba)*",
    "^(ab)+$",
    "[^b]*b[^b]*",
    "(a|bb){2,3}",
    r"(ab|ba\.)*a?",
    r"(.*\.)?a.*",
    "(aab|b){1,}",
    r"b?(a{2}|\.)*",
    r"(?i)A(?:B|.)*?",
    "a|b|ab|abab|bbb",
]
HOLE = None
Row = list[int | None]


def canvas(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """z_BL, hole_BL, valid_BL; shorter rows are padded on the right with the mask."""
    width = max(map(len, rows))
    z_BL, hole_BL, valid_BL = torch.full((len(rows), width), MASK), *torch.zeros(2, len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        z_BL[b, : len(row)] = torch.tensor([MASK if x is None else x for x in row])
        hole_BL[b, : len(row)] = torch.tensor([x is None for x in row])
        valid_BL[b, : len(row)] = True
    return z_BL, hole_BL, valid_BL


def fillings(regex: str, row: Row, free: tuple[int, ...] = (0, 1, 2, 3)) -> list[tuple[int, ...]]:
    """Every filling of the row whose text matches."""
    texts = itertools.product(*(free if x is None else [x] for x in row))
    bare = regex.removeprefix("^").removesuffix("$")
    return [x_L for x_L in texts if 4 not in x_L and re.fullmatch(bare, "".join(PIECES[x] for x in x_L))]


def expected(found: list[tuple[int, ...]], row: Row, width: int) -> Tensor:
    """bool (L, V): the tokens that occur in some filling; what stands there at given positions and padding."""
    out_LV = torch.zeros(width, V, dtype=torch.bool)
    for at, x in enumerate([*row, *[MASK] * (width - len(row))]):
        for token in {x_L[at] for x_L in found} if x is None else [x]:
            out_LV[at, token] = True
    return out_LV


def check(constraint: Constraint, rows: list[Row], found: list[list[tuple[int, ...]]]) -> None:
    z_BL, hole_BL, valid_BL = canvas(rows)
    allowed_BLV = constraint.allowed(z_BL, hole_BL, valid_BL)
    assert allowed_BLV.shape == (*z_BL.shape, V)
    assert allowed_BLV.dtype == torch.bool
    for b, row in enumerate(rows):
        assert torch.equal(allowed_BLV[b], expected(found[b], row, z_BL.shape[1])), row
    assert not allowed_BLV[hole_BL][:, MASK].any()


def every_row(length: int) -> list[Row]:
    return [list(row) for row in itertools.product([HOLE, 0, 1, 3], repeat=length)]


@pytest.mark.parametrize("regex", REGEXES)
def test_a_pattern_allows_what_some_filling_holds(regex: str) -> None:
    """All canvases of up to four positions in one padded batch: whatever is given, wherever it stands."""
    pattern, rows, found = Pattern.compile(regex, PIECES, V), [], []
    for row in (row for length in range(1, 5) for row in every_row(length)):
        fits = fillings(regex, row)
        if fits:
            rows.append(row)
            found.append(fits)
        elif len(row) < 3:
            z_BL, hole_BL, _ = canvas([row])
            with pytest.raises(InputError, match="no match of"):
                pattern.allowed(z_BL, hole_BL)
    assert len(rows) > 3
    assert any(len(row) < 4 for row in rows)
    check(pattern, rows, found)


@pytest.mark.parametrize("regex", ["(a|b)*", "a(b|ba)*", r"(.*\.)?a.*", r"[]b.]*[a-b]"])
@pytest.mark.parametrize("free", [(0, 1), (1, 2), (0, 3)])
def test_allowed_tokens_and_a_pattern_together_are_exact(regex: str, free: tuple[int, ...]) -> None:
    """The intersection of the two masks would be too wide; what is given need not be among the allowed."""
    pattern = both(AllowedTokens(free, V), Pattern.compile(regex, PIECES, V))
    canvases: list[Row] = [*every_row(3), [HOLE] * 4]
    pairs = [(row, fillings(regex, row, free)) for row in canvases]
    rows, found = zip(*(pair for pair in pairs if pair[1]), strict=True)
    check(pattern, list(rows), list(found))


def test_intersecting_the_masks_would_not_do() -> None:
    """`(ab|ba)` of two letters without b: each mask alone leaves `a`, together nothing is left."""
    pattern, z_BL, hole_BL = Pattern.compile("ab|ba|aaa", PIECES, V), *canvas([[HOLE, HOLE]])[:2]
    masks_BLV = pattern.allowed(z_BL, hole_BL) & AllowedTokens([0], V).allowed(z_BL, hole_BL)
    assert masks_BLV.any(-1).all()
    with pytest.raises(InputError, match="no match of"):
        pattern.restricted([0]).allowed(z_BL, hole_BL)


@pytest.mark.parametrize(("one", "two"), [("(a|b)*", ".*b.*"), ("(ab)*", r"(.*a.*){2}"), ("a.*", ".*a"), (r"(a|\.|b)*", r"[^.]*\.?[^.]*")])
def test_two_patterns_hold_together(one: str, two: str) -> None:
    pattern = both(Pattern.compile(one, PIECES, V), Pattern.compile(two, PIECES, V), AllowedTokens([0, 1, 3], V))
    pairs = [(row, [x for x in fillings(one, row, (0, 1, 3)) if x in fillings(two, row, (0, 1, 3))]) for row in every_row(4)]
    rows, found = zip(*(pair for pair in pairs if pair[1]), strict=True)
    check(pattern, list(rows), list(found))


def greedy(found: list[tuple[int, ...]], row: Row, proposal: list[int], mask: int = MASK) -> list[bool]:
    """Left to right, what some filling with all that was kept holds."""
    keep = []
    for at, token in enumerate(proposal):
        fits = [x for x in found if x[at] == token]
        keep.append(row[at] is None and token != mask and bool(fits))
        found = fits if keep[-1] else found
    return keep


@pytest.mark.parametrize("free", [(0, 1, 2, 3), (0, 3), (1, 2)])
@pytest.mark.parametrize("regex", REGEXES)
def test_agree_keeps_the_greedy_set_of_every_proposal(regex: str, free: tuple[int, ...]) -> None:
    pattern, proposals = Pattern.compile(regex, PIECES, V), list(itertools.product([MASK, 0, 1, 2, 3], repeat=3))
    canvases: list[Row] = [[HOLE] * 3, [0, HOLE, HOLE, HOLE], [HOLE, HOLE, 1, HOLE]]
    for row in canvases:
        found = fillings(regex, row, free)
        if found:
            z_BL, hole_BL, _ = canvas([row] * len(proposals))
            next_BL = z_BL.clone()
            next_BL[hole_BL] = torch.tensor(proposals).flatten()
            keep_BL = pattern.restricted(free).agree(z_BL, hole_BL, next_BL)
            assert keep_BL.tolist() == [greedy(found, row, proposal) for proposal in next_BL.tolist()]


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(REGEXES),
    st.lists(st.lists(st.sampled_from([HOLE, HOLE, HOLE, 0, 1, 3]), min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_agree_keeps_what_can_be_completed(regex: str, rows: list[Row], data: st.DataObject) -> None:
    """With the mask for positions that propose nothing. What each position may be by itself, at least one of them may."""
    found = [fillings(regex, row) for row in rows]
    assume(all(found))
    pattern = Pattern.compile(regex, PIECES, V)
    z_BL, hole_BL, valid_BL = canvas(rows)
    allowed_BLV, next_BL = pattern.allowed(z_BL, hole_BL, valid_BL), z_BL.clone()
    single = data.draw(st.booleans())
    for b, row in enumerate(rows):
        for at, x in enumerate(row):
            tokens = allowed_BLV[b, at].nonzero().flatten().tolist() if single else [0, 1, 2, 3]
            next_BL[b, at] = data.draw(st.sampled_from([MASK, *tokens])) if x is None else x
    keep_BL = pattern.agree(z_BL, hole_BL, next_BL, valid_BL)
    for b, row in enumerate(rows):
        proposal = next_BL[b, : len(row)].tolist()
        assert keep_BL[b, : len(row)].tolist() == greedy(found[b], row, proposal)
        assert not keep_BL[b, len(row) :].any()
    if single:
        assert torch.equal(keep_BL.any(-1), (next_BL != z_BL).any(-1))
    kept_BL = torch.where(keep_BL, next_BL, z_BL)
    pattern.allowed(kept_BL, hole_BL & ~keep_BL, valid_BL)  # what was kept can be completed


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_filling_one_by_one_never_fails(order: str) -> None:
    """Any order, any allowed token: the text matches in the end, for lengths that brute force cannot reach."""
    regex = r"((a|b){3,5}\.)*(ab)*"
    pattern, rng, length = Pattern.compile(regex, PIECES, V), torch.Generator().manual_seed(0), 40
    z_BL, hole_BL, valid_BL = canvas([[HOLE] * length, [0, *[HOLE] * (length - 3), 1]])
    columns = {"forward": range(length), "backward": range(length - 1, -1, -1), "shuffled": torch.randperm(length, generator=rng).tolist()}
    for at in columns[order]:
        allowed_BV = pattern.allowed(z_BL, hole_BL, valid_BL)[:, at]
        token_B = torch.where(hole_BL[:, at], torch.multinomial(allowed_BV.double(), 1, generator=rng).squeeze(1), z_BL[:, at])
        z_BL[:, at], hole_BL[:, at] = token_B, False
    for row in z_BL.tolist():
        text = "".join(PIECES[x] for x in row if x in PIECES)
        assert re.fullmatch(regex, text), text


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    pattern = Pattern.compile(r"[^.]*(\.[^.]*\.[^.]*)*", PIECES, V)
    rows: list[Row] = [[HOLE] * 70, [0, HOLE, 1, HOLE], [HOLE, 3], [HOLE] * 70]  # more positions than are looked up at once
    rows[3][35] = 3
    z_BL, hole_BL, valid_BL = canvas(rows)
    together_BLV = pattern.allowed(z_BL, hole_BL, valid_BL)
    for b, row in enumerate(rows):
        alone_1LV = pattern.allowed(*canvas([row])[:2])
        assert torch.equal(together_BLV[b, : len(row)], alone_1LV[0])


def test_allowed_tokens() -> None:
    some, flags_V = AllowedTokens([2, 0, 2, MASK], V), torch.tensor([True, False, True, False, False, True])
    assert some.ids == (0, 2)
    assert some == AllowedTokens(flags_V, V) == AllowedTokens(torch.tensor([0, 2]), V)
    rows: list[Row] = [[HOLE, 1, HOLE], [3, HOLE]]
    check(some, rows, [[(0, 1, 0), (2, 1, 2)], [(3, 0), (3, 2)]])
    z_BL, hole_BL, _ = canvas(rows)
    next_BL = torch.tensor([[0, 2, 1], [0, MASK, MASK]])
    assert some.agree(z_BL, hole_BL, next_BL).tolist() == [[True, False, False], [False, False, False]]
    assert AllowedTokens([0, 5], 6, mask_id=0).ids == (5,)
    joined = both(some, AllowedTokens([1, 2], V))
    assert isinstance(joined, AllowedTokens)
    assert joined.ids == (2,)
    for wrong in ([], [MASK], [6], [-1], torch.ones(5, dtype=torch.bool)):
        with pytest.raises(InputError, match="allowed"):
            AllowedTokens(wrong, V)
    with pytest.raises(InputError, match="no token is allowed"):
        both(some, AllowedTokens([1], V))


def test_a_contradiction_is_named() -> None:
    pattern = Pattern.compile("(ab)*a?", PIECES, V)
    rows: dict[str, list[Row]] = {
        "goes on with token 2: ": [[0, 0, HOLE]],
        "goes on with token 3: ": [[0, HOLE, 1]],
        "goes on with token 1 of row 1: ": [[HOLE], [1, HOLE]],
    }
    for words, wrong in rows.items():
        z_BL, hole_BL, valid_BL = canvas(wrong)
        for act in (pattern.allowed, lambda *x: pattern.agree(x[0], x[1], x[0], x[2])):
            with pytest.raises(InputError, match=re.escape(f"no match of '(ab)*a?' {words}")) as caught:
                act(z_BL, hole_BL, valid_BL)
            assert "\n" not in str(caught.value)
    short = Pattern.compile("a{5}", PIECES, V)
    with pytest.raises(InputError, match="ends with token 3 of row 1"):
        short.allowed(*canvas([[HOLE] * 5, [HOLE] * 3]))
    with pytest.raises(InputError, match="goes on with token 6"):
        short.allowed(*canvas([[HOLE] * 7]))


UNUSABLE = [
    "(",
    "a**",
    "[b-a]",
    "a{3,1}",
    "a(?=b)",
    "(?!ab)a*",
    "(?<=a)b",
    "a++b",
    "(?>a*)b",
    r"(a)\1",
    "a^b",
    "a$|b",
    r"\bab",
    "(?#x)",
    "(?m)a",
    "[",
]


@pytest.mark.parametrize("regex", [*UNUSABLE, "c+", r"a\$", r"[\W\D]", r"(?i)[^a\W]"])
def test_an_expression_that_cannot_be_used_is_told_in_one_line(regex: str) -> None:
    with pytest.raises(InputError) as caught:
        Pattern.compile(regex, PIECES, V)
    assert repr(regex) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_expression_whose_automaton_explodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlm.sampling.diffusion.automaton.MAX_SECONDS", 0.05)
    with pytest.raises(InputError, match="too many states, make it simpler"):
        Pattern.compile("(a|b)*a(a|b){12}", PIECES, V)
    assert sys.getprofile() is None
    monkeypatch.undo()
    Pattern.compile("(a|b)*a", PIECES, V)


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "interegular", None)
    with pytest.raises(InputError, match=re.escape("pip install 'dlm[constraints]'")):
        Pattern.compile("a", PIECES, V)


def test_characters_outside_ascii_and_tokens_without_text() -> None:
    pieces = {0: "é", 1: "\ufffd", 2: "\n", 3: "ß", 4: "$"}
    hole = canvas([[HOLE]])[:2]
    for regex, fits in (
        (".", [0, 3, 4]),
        ("[^ß]", [0, 2, 4]),
        (r"[\s\S]", [0, 2, 3, 4]),
        (r"\$$", [4]),
        ("^[é-î]$", [0]),
        (r"^.\\?$", [0, 3, 4]),
    ):
        allowed_1LV = Pattern.compile(regex, pieces, V).allowed(*hole)
        assert allowed_1LV[0, 0].nonzero().flatten().tolist() == fits, regex


def test_the_automaton_is_no_larger_than_it_must_be() -> None:
    pattern = Pattern.compile("(ab?){3}", PIECES, V)
    assert pattern.both(pattern).automaton.next_SK.shape == pattern.automaton.next_SK.shape == (1 + 7, 4)  # ba. is as dead as the mask


def test_a_pattern_prints_as_its_expression() -> None:
    assert repr(Pattern.compile("a+", PIECES, V)) == "Pattern(automaton=Automaton(regex='a+'))"


# --- bytes: characters of several tokens -----------------------------------------------------------------------------

HALVES = {  # 天 is E5 A4 A9 and 大 E5 A4 A7; the first token of a text loses its space
    0: Part(b"\xe5"),
    1: Part(b"\xa4"),
    2: Part(b"\xa9"),
    3: Part(b"\xa7"),
    4: Part("天".encode()),
    5: Part(b" a", b"a"),
    6: Part(b"\xa9\xe5"),
    7: Part(b"a"),
}
SPELT = Spelling(HALVES, mask_id=8)
BYTE_REGEXES = ["天.*", "[天a]*", "(天| a|大)+", "a?[^天]*", r"\S*", "[^大]{2}", "a( a)+a?", ".", "é|天"]


def spelt(x_L: tuple[int, ...]) -> str | None:
    """The text of these tokens, None where it is none."""
    first = next((i for i, x in enumerate(x_L) if HALVES[x].inner), 0)
    data = b"".join(HALVES[x].first if i == first and HALVES[x].first is not None else HALVES[x].inner for i, x in enumerate(x_L))  # type: ignore[misc]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def byte_rows() -> list[Row]:
    rows: list[Row] = [[HOLE] * length for length in range(1, 5)]
    return [
        *rows,
        [0, HOLE, HOLE],
        [HOLE, 1, HOLE, HOLE],
        [HOLE, HOLE, 2],
        [5, HOLE, HOLE],
        [HOLE, 6, HOLE, HOLE],
        [4, HOLE, 5],
        [HOLE, 7, HOLE],
    ]


def expected_bytes(row: Row, fits: list[tuple[int, ...]]) -> Tensor:
    out_LV = torch.zeros(len(row), 9, dtype=torch.bool)
    for at, x in enumerate(row):
        out_LV[at, list({x_L[at] for x_L in fits}) if x is None else [x]] = True
    return out_LV


@pytest.mark.parametrize("regex", BYTE_REGEXES)
def test_d9_a_pattern_over_bytes_allows_what_some_filling_holds(regex: str) -> None:
    """Every filling of every canvas, joined into characters, by Python's `re`; also what is kept of a proposal."""
    pattern, fitting = Pattern.compile(regex, SPELT, 9), 0
    for row in byte_rows():
        every = list(itertools.product(*(range(8) if x is None else [x] for x in row)))
        fits = [x_L for x_L in every if (text := spelt(x_L)) is not None and re.fullmatch(regex, text)]
        z_BL, hole_BL, valid_BL = canvas([row])
        z_BL[hole_BL] = 8
        if not fits:
            with pytest.raises(InputError, match="no match of"):
                pattern.allowed(z_BL, hole_BL, valid_BL)
            continue
        fitting += 1
        assert torch.equal(pattern.allowed(z_BL, hole_BL, valid_BL)[0], expected_bytes(row, fits)), row
        for proposal in every[:: max(1, len(every) // 40)]:
            keep_BL = pattern.agree(z_BL, hole_BL, torch.tensor([proposal]), valid_BL)
            assert keep_BL[0].tolist() == greedy(fits, row, list(proposal), mask=8)
    assert fitting > 0


@pytest.mark.parametrize("characters", ["天", "天a", "天 a大"])
@pytest.mark.parametrize("with_pattern", [False, True])
def test_d9_a_set_of_characters_holds_for_what_is_written_alone(characters: str, with_pattern: bool) -> None:
    """Given tokens are whole characters, in one token or in three, and need not be in the set."""
    constraint = Pattern.of_set(characters, SPELT, 9)
    if with_pattern:
        constraint = constraint.both(Pattern.compile(r"(.|\n)*a?天(.|\n)*", SPELT, 9))
    regex = r"(.|\n)*a?天(.|\n)*" if with_pattern else r"(.|\n)*"
    rows: list[Row] = [[0, 1, 3, HOLE, HOLE, HOLE], [HOLE, 7, HOLE], [5, HOLE, HOLE, HOLE], [HOLE, HOLE, HOLE, 0, 1, 3], [4, HOLE, 7, HOLE]]
    for row in rows:
        fits = []
        for x_L in itertools.product(*(range(8) if x is None else [x] for x in row)):
            text = spelt(x_L)
            if text is None or not re.fullmatch(regex, text):
                continue
            parts = [list(group) for hole, group in itertools.groupby(enumerate(x_L), key=lambda pair: row[pair[0]] is None) if hole]
            try:
                new = [b"".join((HALVES[x].first if at == 0 and HALVES[x].first else HALVES[x].inner) for at, x in part) for part in parts]  # type: ignore[misc]
                if set("".join(data.decode() for data in new)) <= set(characters):
                    fits.append(x_L)
            except UnicodeDecodeError:
                continue
        z_BL, hole_BL, valid_BL = canvas([row])
        z_BL[hole_BL] = 8
        if fits:
            assert torch.equal(constraint.allowed(z_BL, hole_BL, valid_BL, ~hole_BL)[0], expected_bytes(row, fits)), row
        else:
            with pytest.raises(InputError, match="no match of"):
                constraint.allowed(z_BL, hole_BL, valid_BL, ~hole_BL)


def test_d9_what_was_written_stays_in_the_set() -> None:
    """天 is E5 A4 A9 and 地 E5 9C B0: with A9 written, E5 9C would make a third character of it."""
    spelling = Spelling({i: Part(bytes([byte])) for i, byte in enumerate((0xE5, 0xA4, 0xA9, 0x9C, 0xB0))}, mask_id=5)
    z_BL, hole_BL = torch.tensor([[5, 5, 2]]), torch.tensor([[True, True, False]])
    free = Pattern.of_set("天地", spelling, 6).allowed(z_BL, hole_BL, None, torch.zeros_like(hole_BL))
    assert free[0, :2].nonzero().tolist() == [[0, 0], [1, 1]]


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_d9_every_byte_of_any_text_is_allowed_and_no_broken_one(text: str, data: st.DataObject) -> None:
    spelling = Spelling({i: Part(bytes([i])) for i in range(256)}, mask_id=256)
    ids = list(text.encode())
    chars = "".join(sorted(set(text)))
    pattern = Pattern.compile(f"[{re.escape(chars)}]*", spelling, 257)
    at = data.draw(st.integers(0, len(ids) - 1))
    z_BL, hole_BL = torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.bool)
    z_BL[0, at], hole_BL[0, at] = 256, True
    allowed = set(pattern.allowed(z_BL, hole_BL)[0, at].nonzero().flatten().tolist())
    fits = set()
    for byte in range(256):
        try:
            fits |= {byte} if set(bytes([*ids[:at], byte, *ids[at + 1 :]]).decode()) <= set(chars) else set()
        except UnicodeDecodeError:
            continue
    assert allowed == fits
