"""Frames as Flower carries them: what is read is what was written, in as few parts as that takes."""

import os

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from flwr.app import ConfigRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedloom.deployment.flower.apps import to_frame, to_record
from fedloom.host.frames import Frame


@pytest.mark.parametrize(
    ("payload_bytes", "parts"),
    [(0, 2), (4, 3), (CHUNK_BYTES, 3), (CHUNK_BYTES + 4, 6), (3 * CHUNK_BYTES, 8)],
)
def test_a_frame_comes_out_as_it_went_in_and_is_few_parts(payload_bytes: int, parts: int) -> None:
    """Each part is a request, and a message is one more."""
    frame = Frame({"do": "train", "seconds": 1.5}, os.urandom(payload_bytes))
    record = to_record(frame)
    objects = get_all_nested_objects(record)
    assert len(objects) == parts
    contents = {name: one.deflate() for name, one in objects.items()}
    found = inflate_object_from_contents(record.object_id, contents)
    assert isinstance(found, RecordDict)
    assert to_frame(found) == frame


def test_questions_with_the_same_numbers_share_them() -> None:
    """The SuperLink then keeps one adapter a round, whatever the number of clients."""
    numbers = os.urandom(4000)
    one, other = (get_all_nested_objects(to_record(Frame({"client": number}, numbers))) for number in range(2))
    assert any(len(shared.deflate()) > 4000 for name, shared in one.items() if name in other)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="numbers that are str"):
        to_frame(RecordDict({"told": ConfigRecord({"manifest": "{}"}), "numbers": ConfigRecord({"all": "1"})}))
