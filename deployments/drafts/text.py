"""The text of a pretrain or continue-pretrain recipe: each line's comment says what was seen, or whence a size."""

from collections.abc import Iterator
from pathlib import Path

from deployments.drafts.lines import (
    Line,
    enough_held_out,
    header,
    joined,
    near,
    numbered,
    scalar,
    shown_size,
    source_name,
    what_was_seen,
)
from fmcore.artifacts.store import Store
from fmcore.data.look import TextLook, look_at_text
from fmcore.errors import DataError
from fmcore.model.presets import PRESETS, estimate_parameters
from fmcore.planning.cost import BYTES_PER_TOKEN
from fmcore.planning.sizes import BUDGET_S, holdout_for, pretrain_sizes, rounded, usual_rate

DEFAULT_HOLDOUT = 0.02
TINY = estimate_parameters(PRESETS["tiny"], 4096)


class TextDraft:
    """Writes recipes of text sources for one folder: paths are written as seen from there."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder = folder
        self._store = store

    def lines(self, kind: str, name: str, paths: list[str], parent: str) -> list[Line]:
        """A pretrain recipe, or with a parent a continue-pretrain one. Raises DataError for unusable data."""
        looks = [look_at_text(path) for path in paths]
        for look in looks:
            if not look.places:
                raise DataError(f"--data {look.sample.data.path}: no document is left; dropped: {look.dropped}")
        fractions = [holdout_for(look.places, look.sample.scale, DEFAULT_HOLDOUT) for look in looks]
        holdout = max(enough_held_out(fraction, look) for fraction, look in zip(fractions, looks, strict=True))
        sources = list(numbered([source_name(look.sample.data.path, name) for look in looks]))
        lines = [
            *header(kind),
            Line(f"name: {name}"),
            *([Line(f"parent: {scalar(parent)}", "its next version is made")] if parent else []),
            Line("data:"),
            Line("  sources:"),
        ]
        for source, look in zip(sources, looks, strict=True):
            lines += self._source(source, look)
        num = sum(sum(place < holdout for place in look.places) * look.sample.scale for look in looks)
        lines.append(Line(f"  holdout: {holdout:g}", f"of the documents, by content: {_about(looks)}{num:,.0f} here"))
        if any(look.missing or look.sample.problems for look in looks):
            lines.append(Line("  on_bad_input: quarantine", "what has no text is set aside, not fatal"))
        num_bytes = sum(look.num_bytes for look in looks)
        return [*lines, *(self._continue_sizes(num_bytes) if parent else self._pretrain_sizes(name, num_bytes))]

    def _source(self, name: str, look: TextLook) -> Iterator[Line]:
        sample = look.sample
        for line in what_was_seen(sample):
            yield Line(f"    # {line}")
        if look.dropped:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(look.dropped.items()))
            yield Line(f"    # {len(look.places):,} are kept; dropped will be: {reasons}")
        if look.missing:
            yield Line(f"    # {look.missing:,} have no text in {look.text_field}")
        yield Line(f"    - name: {name}")
        yield Line(f"      path: {scalar(near(sample.data.path, self._folder))}")
        if sample.data.format == "text":
            comment = {"file": "a long file is cut at blank lines", "blank_line": "", "line": "a line, a document"}
            yield Line("      format: text")
            yield Line(f"      split_on: {look.split_on}", comment[look.split_on])
            return
        yield Line(f"      format: {sample.data.format}")
        if sample.data.split:
            yield Line(f"      split: {sample.data.split}")
        others = [field for field in sample.fields if field != look.text_field]
        yield Line(f"      text_field: {scalar(look.text_field)}", f"of {look.text_field}, {joined(others)}")

    def _pretrain_sizes(self, name: str, num_bytes: int) -> Iterator[Line]:
        sizes = pretrain_sizes(num_bytes, usual_rate(TINY, self._store))
        yield Line(f"tokenizer: {{vocab_size: {sizes.vocab_size}}}", f"for {shown_size(num_bytes)} of text")
        yield Line(f"model: {{preset: {sizes.preset}}}", "tiny | small | 125m | 1b")
        yield Line("train:")
        yield Line(f"  tokens: {sizes.tokens:_}", f"{sizes.epochs:.2g} epochs", timed=True)
        yield Line(f"  seq_len: {sizes.seq_len}", "context, in tokens")
        yield Line(f"  batch_tokens: {sizes.batch_tokens}", f"{sizes.tokens // sizes.batch_tokens:,} steps")
        yield Line(f"  lr: {sizes.lr:g}")
        yield Line(f"register: {{model: {name}}}")

    def _continue_sizes(self, num_bytes: int) -> Iterator[Line]:
        yield Line("replay: {fraction: 0.05}", "share of the samples from what the parent has seen")
        tokens = num_bytes / BYTES_PER_TOKEN
        affordable = rounded(BUDGET_S * usual_rate(TINY, self._store) / (6 * TINY))
        if tokens <= affordable:
            yield Line(
                "train: {epochs: 1}",
                f"{shown_size(num_bytes)}, about {rounded(tokens):,} tokens, if all is new",
                timed=True,
            )
        else:
            yield Line(
                f"train: {{tokens: {affordable:_}}}",
                f"of about {rounded(tokens):,}; what is left stays new",
                timed=True,
            )
        yield Line("gate: {max_regression_bpb: 0.01}", "tolerated loss on old data, in bits per byte")


def _about(looks: list[TextLook]) -> str:
    return "" if all(look.sample.exact for look in looks) else "about "
