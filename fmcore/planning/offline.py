"""Parents while the registry is away: what an unfinished run of the recipe found, or a version named by number."""

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ACCEPTED, RegisteredModel
from fmcore.errors import TrackingError
from fmcore.planning.runs import RunRecord
from fmcore.tracking.imported import IMPORTED


def offline_parent(reference: str, store: Store, record: RunRecord, outage: TrackingError) -> RegisteredModel:
    """The parent as this home knows it. Raises TrackingError where only the registry could say.

    outage: how the registry failed. An alias may have moved since, so it is not guessed; a number means the same
    for ever, and a version that the gate refused is taken only where the run had taken it before.
    """
    fingerprint = record.parent_for(None)
    found = store.find_fingerprint(fingerprint, RegisteredModel) if fingerprint else None
    found = found or _numbered(reference, store)
    if found is None:
        raise TrackingError(
            f"{reference} has to be looked up in the registry, which is away, and no unfinished run of this recipe has "
            f"noted a parent. Start it again when the registry answers, or name a version of this home by its number, "
            f"as in plays/1. {outage}"
        ) from None
    return found


def _numbered(reference: str, store: Store) -> RegisteredModel | None:
    wanted = reference.removeprefix("models:/")
    known = [model for model in store.all(RegisteredModel) if model.uri == wanted and _may_be_parent(model)]
    return known[0] if len(known) == 1 else None  # two registries may have given one number twice


def _may_be_parent(model: RegisteredModel) -> bool:
    return model.verdict in ACCEPTED or model.stage == IMPORTED
