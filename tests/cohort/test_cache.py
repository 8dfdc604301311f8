"""Prepared volumes on disk: exact to what they promise, checked, written whole or not at all."""

import dataclasses
import errno
import os
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medctkit.cohort.cache import STEPS, VolumeCache, cache_key, digest_of
from medctkit.scans.preprocessing import PreprocessConfig


def volume(shape=(1, 11, 6, 5), seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


@pytest.fixture
def cache(tmp_path):
    return VolumeCache(tmp_path / "prepared")


lengths = st.integers(1, 20)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.just(1), lengths, lengths, lengths), st.integers(0, 99))
def test_what_comes_back_is_what_went_in_to_a_sixteenth_of_a_hounsfield_unit(tmp_path_factory, shape, seed):
    cache, x = VolumeCache(tmp_path_factory.mktemp("cache")), volume(shape, seed)
    cache.save("k", x)
    found = cache.load("k")
    assert found.dtype == torch.float32 and found.shape == x.shape
    assert (found - x).abs().max() <= 0.5 / STEPS < 1e-4


def test_air_padding_and_whole_steps_are_exact(cache):
    x = torch.tensor([-1, -1, 1, 0, 0.5, 0.25, -0.125, 1 / STEPS]).view(1, 2, 2, 2)
    cache.save("k", x)
    assert torch.equal(cache.load("k"), x)


def test_the_same_volume_gives_the_same_bytes_and_fewer_than_it_has(cache):
    z, y, x = np.indices((16, 48, 48))
    smooth = torch.from_numpy((np.sin(z / 9) * np.cos(y / 7) * np.sin(x / 8)).astype(np.float32))[None]
    assert cache.save("k", smooth) == cache.path("k").stat().st_size < 0.7 * 2 * smooth.numel()
    first = cache.path("k").read_bytes()
    cache.save("k", smooth)
    assert cache.path("k").read_bytes() == first


def test_nothing_there(cache):
    assert cache.load("none") is None and not cache.has("none")


@pytest.mark.parametrize(
    "wrong",
    [volume() * 1.1, volume() - 1, volume()[0], volume((2, 4, 4, 4)), torch.full((1, 4, 4, 4), float("nan"))],
    ids=["above 1", "below -1", "3-D", "two channels", "NaN"],
)
def test_what_is_no_prepared_volume_is_refused(cache, wrong):
    with pytest.raises(ValueError, match=r"a prepared volume is \(1, z, x, y\) with values in \[-1, 1\]"):
        cache.save("k", wrong)
    assert not cache.folder.exists()


# --- damage


def test_a_file_cut_off_anywhere_is_noticed(cache):
    cache.save("k", volume((1, 10, 4, 4)))
    file = cache.path("k")
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        assert not cache.has("k") and cache.load("k") is None
    file.write_bytes(content + b"\0")
    assert cache.load("k") is None


def test_a_flipped_bit_anywhere_is_noticed(cache):
    cache.save("k", volume((1, 10, 4, 4)))
    exact, file = cache.load("k"), cache.path("k")
    content = file.read_bytes()
    for at in range(len(content)):
        for bit in (1, 16, 128):
            file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            found = cache.load("k")  # a bit that nobody reads does no harm
            assert found is None or torch.equal(found, exact)


def test_a_file_under_another_name_is_not_taken_for_it(cache):
    cache.save("a", volume())
    os.replace(cache.path("a"), cache.path("b"))
    assert cache.load("b") is None and not cache.has("b")


# --- keys


def test_every_setting_has_its_own_file():
    config = PreprocessConfig()
    other = {"spacing": (1.5, 0.75, 0.8), "shape": (240, 480, 479), "antialias": True}
    other |= {"hu_range": (-1000, 200), "axes": "zyx"}
    assert set(other) == {field.name for field in dataclasses.fields(PreprocessConfig)}
    configs = [config, *(dataclasses.replace(config, **{name: value}) for name, value in other.items())]
    readings = [{}, {"rescale_slope": 1.0}, {"rescale_intercept": 1.0}, {"spacing": (1.0, 1.0, 1.0)}]
    readings += [{"orientation": "stored"}, {"orientation": "canonical"}, {"series": "2"}]
    keys = [cache_key(content, reading, c) for content in ("a", "b") for reading in readings for c in configs]
    assert len(set(keys)) == 2 * len(readings) * len(configs)
    assert all(len(key) == 32 for key in keys)
    reading = {"rescale_slope": 1.0, "orientation": "stored"}
    assert cache_key("a", reading, config) == cache_key("a", dict(reversed(reading.items())), config), "in any order"


def test_the_digest_is_of_content_not_of_names(tmp_path):
    for folder, names in {"a": "12", "b": "34"}.items():
        (tmp_path / folder).mkdir()
        for name, content in zip(names, ("x", "y"), strict=True):
            (tmp_path / folder / name).write_text(content)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b") != digest_of(tmp_path / "a" / "1")
    assert digest_of(tmp_path / "a" / "1") == digest_of(tmp_path / "b" / "3")
    (tmp_path / "b" / "3").write_text("z")
    assert digest_of(tmp_path / "a") != digest_of(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        digest_of(tmp_path / "c")


# --- a full disk, a killed writer


def test_a_full_disk_leaves_no_half_file(cache):
    resource = pytest.importorskip("resource")
    cache.save("k", volume())
    before, limits = cache.path("k").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # a real error from the system, amid the file
    try:
        with pytest.raises(OSError) as caught:
            cache.save("k", torch.linspace(-1, 1, 24 * 40 * 40).view(1, 24, 40, 40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [file.name for file in cache.folder.iterdir()] == ["k.safetensors"]
    assert cache.path("k").read_bytes() == before, "the file that was there is gone"


def test_what_killed_writers_left_is_swept_up_the_rest_stays(cache):
    cache.save("k", volume())
    old, fresh = cache.folder / ".k.1.abcd.tmp", cache.folder / ".k.2.abcd.tmp"
    for file in (old, fresh):
        file.write_text("half")
    os.utime(old, times=(time.time() - 2 * 24 * 3600,) * 2)
    cache.sweep()
    assert {file.name for file in cache.folder.iterdir()} == {"k.safetensors", fresh.name}
    VolumeCache(cache.folder / "none").sweep()
