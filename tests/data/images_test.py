"""Images from folders and records, in splits, moved and mirrored.

Over 300 lines: most read one folder, made once.
"""

import dataclasses
import importlib
import io
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficient_llm.data import images, pipeline
from tests import tiny_images

_SIZE = 6


def _write_records(path: pathlib.Path, records: list[bytes]) -> None:
  # A compiled module without type information.
  module = importlib.import_module('array_record.python.array_record_module')
  writer = module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


def _config(path: pathlib.Path | str, **changes: Any) -> pipeline.DataConfig:
  settings: dict[str, Any] = {
    'path': str(path),
    'objective': 'classes',
    'image_size': _SIZE,
    'batch_size': 4,
    'validation_fraction': 0.25,
    **changes,
  }
  return pipeline.DataConfig(**settings)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('images')
  tiny_images.write_folder(folder / 'images', size=_SIZE)
  return folder


def _open(
  folder: pathlib.Path, split: Any = 'train', **changes: Any
) -> images.Dataset:
  config = _config(folder / 'images', **changes)
  return images.open_dataset(config, split=split, cache_dir=folder / 'cache')


def _whole_pass(dataset: images.Dataset) -> dict[bytes, int]:
  """Class of every image, by its pixels."""
  found: dict[bytes, int] = {}
  batches = dataset.iterate(repeat=False)
  for batch in batches:
    rows = zip(
      batch['images'], batch['targets'], batch['loss_weights'], strict=True
    )
    for pixels, target, weight in rows:
      if weight[0]:
        found[pixels.tobytes()] = int(target[0])
  batches.close()
  return found


def test_a_batch_holds_bytes_classes_and_weights(folder: pathlib.Path) -> None:
  batch = _open(folder).batch_at(0)
  assert batch['images'].shape == (4, _SIZE, _SIZE, 3)
  assert batch['images'].dtype == np.uint8
  assert batch['targets'].shape == batch['loss_weights'].shape == (4, 1)
  assert batch['targets'].dtype == np.int32
  assert (batch['loss_weights'] == 1).all()


def test_classes_are_the_folders_in_order(folder: pathlib.Path) -> None:
  dataset = _open(folder)
  assert dataset.classes.names == tiny_images.CLASSES
  files = {
    np.asarray(Image.open(path).convert('RGB')).tobytes(): name
    for name in tiny_images.CLASSES
    for path in (folder / 'images' / name).iterdir()
  }
  for split in ('train', 'validation'):
    for pixels, target in _whole_pass(_open(folder, split)).items():
      assert files[pixels] == dataset.classes.names[target]


def test_the_splits_share_no_image_and_miss_none(folder: pathlib.Path) -> None:
  train = _whole_pass(_open(folder))
  validation = _whole_pass(_open(folder, 'validation'))
  assert not train.keys() & validation.keys()
  assert len(train) + len(validation) == tiny_images.NUM_IMAGES
  assert 0 < len(validation) < len(train)


def test_more_images_move_no_other(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  tiny_images.write_folder(tmp_path / 'images', size=_SIZE)
  tiny_images.write_folder(tmp_path / 'images', size=_SIZE, seed=1)
  before = _whole_pass(_open(folder, 'validation'))
  after = _whole_pass(_open(tmp_path, 'validation'))
  assert before.keys() < after.keys()


def test_the_last_validation_batch_is_filled_with_nothing(
  folder: pathlib.Path,
) -> None:
  dataset = _open(folder, 'validation', batch_size=7)
  batches = list(dataset.iterate(repeat=False))
  weights = np.concatenate([batch['loss_weights'] for batch in batches])
  assert weights.sum() == dataset.num_sequences < len(weights)
  assert not batches[-1]['images'][weights[-7:, 0] == 0].any()


def test_records_are_the_files_of_a_folder(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  path = tmp_path / 'images.array_record'
  files = sorted((folder / 'images').glob('*/*.png'))
  _write_records(
    path, [f.parent.name.encode() + b'\n' + f.read_bytes() for f in files]
  )
  found = images.open_dataset(_config(path), cache_dir=tmp_path)
  assert found.classes.names == tiny_images.CLASSES
  assert _whole_pass(found) == _whole_pass(_open(folder))


def test_order_goes_on_where_it_stood(folder: pathlib.Path) -> None:
  dataset = _open(folder, image_shift=2, image_flip=True)
  first = dataset.iterate()
  for _ in range(11):
    next(first)
  state = first.get_state()
  expected = [next(first) for _ in range(9)]
  again = dataset.iterate()
  again.set_state(state)
  for batch in expected:
    found = next(again)
    for name, value in batch.items():
      np.testing.assert_array_equal(found[name], value)
  first.close()
  again.close()


def test_processes_share_a_batch(folder: pathlib.Path) -> None:
  dataset = _open(folder, image_shift=1)
  whole = dataset.batch_at(3)['images']
  parts = []
  for index in range(2):
    batches = dataset.iterate(process=(index, 2), start=3)
    parts.append(next(batches)['images'])
    batches.close()
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_every_epoch_draws_anew(folder: pathlib.Path) -> None:
  """All places of one image are seen, and none beyond the shift."""
  dataset = _open(folder, image_shift=1, shuffle=False)
  per_pass = dataset.num_sequences
  batches = dataset.iterate()
  seen = [next(batches)['images'] for _ in range(per_pass * 40 // 4)]
  batches.close()
  of_first = np.concatenate(seen)[::per_pass]
  plain = _open(folder, shuffle=False).batch_at(0)['images'][0]
  padded = np.pad(plain, ((1, 1), (1, 1), (0, 0)), mode='edge')
  allowed = {
    padded[y : y + _SIZE, x : x + _SIZE].tobytes()
    for y in range(3)
    for x in range(3)
  }
  assert {image.tobytes() for image in of_first} == allowed


def test_images_are_mirrored_half_of_the_time() -> None:
  config = _config('x', image_flip=True)
  one = np.arange(_SIZE * _SIZE * 3, dtype=np.uint8)
  many = np.broadcast_to(
    one.reshape(1, _SIZE, _SIZE, 3), (400, _SIZE, _SIZE, 3)
  )
  found = images.augment(many, np.arange(400), config)
  is_mirrored = (found == many[:, :, ::-1]).all((1, 2, 3))
  assert (is_mirrored | (found == many).all((1, 2, 3))).all()
  # Four standard deviations of 400 throws of a coin.
  assert abs(is_mirrored.mean() - 0.5) < 0.1


def test_validation_is_not_moved(folder: pathlib.Path) -> None:
  plain = _open(folder, 'validation').batch_at(0)
  moved = _open(folder, 'validation', image_shift=2, image_flip=True)
  np.testing.assert_array_equal(plain['images'], moved.batch_at(0)['images'])


def test_images_are_scaled_by_the_shorter_side_and_cut(
  tmp_path: pathlib.Path,
) -> None:
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:, 4:12] = (200, 100, 50)
  (tmp_path / 'a').mkdir()
  Image.fromarray(pixels).save(tmp_path / 'a' / 'wide.png')
  config = _config(
    tmp_path, image_size=4, batch_size=1, validation_fraction=0.0
  )
  found = images.open_dataset(config, cache_dir=tmp_path / 'cache').batch_at(0)
  # The middle is left; bicubic edges reach in by a shade.
  middle = found['images'][0, :, 1:3].astype(int)
  assert abs(middle - [200, 100, 50]).max() <= 16
  grey = dataclasses.replace(config, image_channels=1)
  found = images.open_dataset(grey, cache_dir=tmp_path / 'cache').batch_at(0)
  assert found['images'].shape == (1, 4, 4, 1)


def test_other_images_may_be_for_validation(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  tiny_images.write_folder(tmp_path / 'other', size=_SIZE, seed=2)
  changes: dict[str, Any] = {'validation_path': str(tmp_path / 'other')}
  train, validation = (
    _open(folder, split, **changes) for split in ('train', 'validation')
  )
  assert train.num_sequences == tiny_images.NUM_IMAGES
  assert validation.num_sequences == tiny_images.NUM_IMAGES
  tiny_images.write_image(tmp_path / 'other' / 'zebra' / '0.png', size=_SIZE)
  with pytest.raises(ValueError, match=r"has 'zebra'; set"):
    _open(folder, 'validation', **changes)


@pytest.mark.parametrize('kind', ['cut', 'text', 'png', 'jpg'])
def test_a_broken_image_is_named(tmp_path: pathlib.Path, kind: str) -> None:
  tiny_images.write_folder(tmp_path / 'images', size=_SIZE)
  name = 'broken.jpg' if kind == 'jpg' else 'broken.png'
  path = tmp_path / 'images' / 'ant' / name
  buffer = io.BytesIO()
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(buffer, 'JPEG' if kind == 'jpg' else 'PNG')
  whole = buffer.getvalue()
  broken = {
    'cut': whole[: len(whole) // 2],
    'text': b'not an image',
    'png': whole[:100] + bytes(40) + whole[140:],
    'jpg': whole[: len(whole) // 2],
  }
  path.write_bytes(broken[kind])
  with pytest.raises(ValueError, match=r'broken\.\w+.*whole image') as caught:
    _open(tmp_path)
  assert '\n' not in str(caught.value)
  path.unlink()
  assert _open(tmp_path).classes.names == tiny_images.CLASSES


def test_a_broken_record_is_named_with_its_number(
  tmp_path: pathlib.Path,
) -> None:
  path = tmp_path / 'images.array_record'
  good = tiny_images.encode(size=_SIZE, seed=0)
  _write_records(path, [b'ant\n' + good, b'ant' + good.replace(b'\n', b'')])
  with pytest.raises(ValueError, match='record 1 must be the name of a class'):
    images.open_dataset(_config(path), cache_dir=tmp_path)


def test_an_image_without_a_class_is_named(tmp_path: pathlib.Path) -> None:
  tiny_images.write_image(tmp_path / 'images' / 'lost.png', size=_SIZE)
  with pytest.raises(ValueError, match=r'lost\.png.* named after its class'):
    _open(tmp_path)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'path': 'stdlib'}, "path='stdlib' is text"),
    ({'image_size': None}, 'image_size=None must be at least 1'),
    ({'image_channels': 4}, 'image_channels=4 must be 1 or 3'),
    ({'image_shift': 6}, r'image_shift=6 must be in \[0, image_size=6\)'),
    ({'tokenizer': 'bpe:300'}, "tokenizer='bpe:300' is for text"),
    ({'sequence_length': 64}, 'sequence_length=64 is for text'),
    ({'objective': 'causal'}, 'image_size=6 is for images'),
    ({'validation_fraction': 0.0}, 'images for validation and has 0'),
    ({'batch_size': 1000}, 'must have 1000 images for train'),
  ],
)
def test_settings_that_do_not_go_together_are_named(
  folder: pathlib.Path, changes: dict[str, Any], named: str
) -> None:
  config = _config(**{'path': folder / 'images', **changes})
  split = 'train' if 'batch_size' in changes else 'validation'
  with pytest.raises(ValueError, match=named) as caught:
    images.open_dataset(config, split=split, cache_dir=folder / 'cache')
  assert '\n' not in str(caught.value)


def test_text_cannot_be_read_as_classes(folder: pathlib.Path) -> None:
  with pytest.raises(ValueError, match="objective='classes' is of images"):
    pipeline.open_dataset(_config(folder / 'images'))


def test_digits_are_those_of_scikit_learn(tmp_path: pathlib.Path) -> None:
  datasets = pytest.importorskip('sklearn.datasets', reason='needs [vision]')
  config = _config('digits', image_size=8, image_channels=1)
  found = {}
  for split in ('train', 'validation'):
    found |= _whole_pass(
      images.open_dataset(config, split=split, cache_dir=tmp_path)
    )
  digits: Any = datasets.load_digits()
  pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
  assert found == {
    image.tobytes(): target
    for image, target in zip(pixels, digits.target, strict=True)
  }
