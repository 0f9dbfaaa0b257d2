import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cache.latent.codec import DamagedRecordError, decode_header, decode_latent, encode_header, encode_latent
from cache.latent.store import with_sizes
from tests.cache.latent.stores import SHAPE, a_header, latents_of

finite = arrays.arrays(
    np.float16,
    arrays.array_shapes(min_dims=3, max_dims=3, max_side=6),
    elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
)
ids = st.integers(0, 2**63 - 1)
alphas = st.floats(0, 1)


@given(latent=finite, id=ids, alpha=alphas)
def test_a_latent_comes_back_bit_for_bit(latent, id, alpha):
    found = decode_latent(encode_latent(id, alpha, latent), id, alpha)
    assert found.dtype == np.float16
    assert found.shape == latent.shape
    assert found.tobytes() == latent.tobytes()


def test_a_latent_that_is_not_contiguous():
    latent = latents_of()[0].transpose(0, 2, 1)[:, ::2]
    assert np.array_equal(decode_latent(encode_latent(1, 0.5, latent), 1, 0.5), latent)


def test_what_is_read_is_an_array_of_its_own():
    found = decode_latent(encode_latent(1, 0.5, latents_of()[0]), 1, 0.5)
    found += 1  # neither read-only nor shared


def test_noise_takes_85_percent():
    latent = latents_of()[0]
    assert len(encode_latent(1, 0.5, latent)) < 0.85 * latent.nbytes


@pytest.mark.parametrize(
    "latent",
    [
        np.zeros((1, 2, 2), np.float32),
        np.zeros((2, 2), np.float16),
        np.zeros((0, 2, 2), np.float16),
        np.full((1, 2, 2), np.inf, np.float16),
        np.full((1, 2, 2), np.nan, np.float16),
    ],
)
def test_what_is_no_latent_is_refused(latent):
    with pytest.raises(ValueError, match="a latent is"):
        encode_latent(1, 0.5, latent)


@given(latent=finite, data=st.data())
def test_one_flipped_bit_anywhere_is_damage(latent, data):
    record = bytearray(encode_latent(1, 0.5, latent))
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedRecordError):
        decode_latent(bytes(record), 1, 0.5)


@given(length=st.integers(0, 300))
def test_a_record_cut_short_is_damage(length):
    record = encode_latent(1, 0.5, latents_of(shape=(2, 9, 9))[0])
    header = encode_header(a_header())
    with pytest.raises(DamagedRecordError):
        decode_latent(record[:length], 1, 0.5)
    with pytest.raises(DamagedRecordError):
        decode_header(header[:length], a_header().id)


@pytest.mark.parametrize(("id", "alpha"), [(2, 0.5), (1, 0.25)])
def test_the_record_of_another_latent_is_damage(id, alpha):
    with pytest.raises(DamagedRecordError, match="another latent"):
        decode_latent(encode_latent(1, 0.5, latents_of()[0]), id, alpha)


def test_a_header_comes_back():
    header = with_sizes(a_header(3), [7, 8, 9, 10, 11], 4)
    found = decode_header(encode_header(header), header.id)
    assert found.space == header.space
    assert (found.id, found.prompt, found.created) == (header.id, header.prompt, header.created)
    assert (found.levels, found.sizes) == (header.levels, header.sizes)
    assert found.embedding.dtype == np.float32
    assert np.array_equal(found.embedding, header.embedding)


def test_headers_of_one_space_share_it():
    first, second = a_header(1), a_header(2)
    spaces = [decode_header(encode_header(header), header.id).space for header in (first, second)]
    assert spaces[0] is spaces[1]


@given(position=st.integers(0, 2000), bit=st.integers(0, 7))
def test_one_flipped_bit_in_a_header_is_damage(position, bit):
    header = a_header()
    record = bytearray(encode_header(header))
    record[position] ^= 1 << bit
    with pytest.raises(DamagedRecordError):
        decode_header(bytes(record), header.id)


def test_kinds_of_records_are_not_confused():
    header = a_header()
    with pytest.raises(DamagedRecordError):
        decode_latent(encode_header(header), header.id, 0.5)
    with pytest.raises(DamagedRecordError):
        decode_header(encode_latent(header.id, 0.5, latents_of(shape=SHAPE)[0]), header.id)
    with pytest.raises(DamagedRecordError, match="another entry"):
        decode_header(encode_header(header), header.id ^ 1)
