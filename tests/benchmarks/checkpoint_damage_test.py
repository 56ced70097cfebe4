import pathlib

from benchmarks import checkpoint_damage


def test_damage_of_every_kind_of_file_is_noticed(
  tmp_path: pathlib.Path,
) -> None:
  result = checkpoint_damage.measure(
    tmp_path, num_flips=14, num_truncations=0, seed=1
  )
  assert result['undetected'] == result['wrong_restores'] == 0
  assert result['kinds_not_hit'] == []
