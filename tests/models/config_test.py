import dataclasses
from typing import Any

import pytest

from efficient_llm.models import config

_IMAGES = {
  'patch_size': 4,
  'image_size': 8,
  'causal': False,
  'positions': 'learned',
  'tie_embeddings': False,
}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'vocab_size': 0}, 'model.vocab_size=0 must be at least 1.'),
    ({'num_layers': -1}, 'model.num_layers=-1 must be 0 or more.'),
    ({'embed_dim': -1}, 'model.embed_dim=-1 must be at least 1.'),
    ({'num_heads': 0}, 'model.num_heads=0 must be at least 1.'),
    ({'num_kv_heads': 0}, 'model.num_kv_heads=0 must be at least 1.'),
    ({'head_dim': 0}, 'model.head_dim=0 must be at least 1.'),
    ({'mlp_dim': 0}, 'model.mlp_dim=0 must be at least 1.'),
    ({'max_positions': 0}, 'model.max_positions=0 must be at least 1.'),
    ({'scan_unroll': 0}, 'model.scan_unroll=0 must be at least 1.'),
    ({'num_token_types': -1}, 'model.num_token_types=-1 must be 0 or more.'),
    ({'norm_epsilon': 0.0}, 'model.norm_epsilon=0.0 must be positive.'),
    ({'rotary_base': float('inf')}, 'model.rotary_base=inf must be positive.'),
    ({'init_std': 0.0}, 'model.init_std=0.0 must be positive.'),
    (
      {'norm': 'batch'},
      "model.norm='batch' must be one of rms, layer.",
    ),
    (
      {'attention_implementation': 'flash'},
      "model.attention_implementation='flash' must be one of auto, xla, "
      'cudnn, cudnn_mapped, splash, pallas_tpu, pallas_gpu.',
    ),
    (
      {'embed_dim': 100, 'num_heads': 3},
      'model.embed_dim=100 must be divisible by model.num_heads=3; change one '
      'or set model.head_dim.',
    ),
    (
      {'num_kv_heads': 3},
      'model.num_heads=4 must be divisible by model.num_kv_heads=3; change one '
      'of them.',
    ),
    ({'layer_scale': 0.0}, 'model.layer_scale=0.0 must be positive.'),
    ({'patch_size': 0}, 'model.patch_size=0 must be at least 1.'),
    ({'class_layers': -1}, 'model.class_layers=-1 must be 0 or more.'),
    (
      {'class_layers': 2},
      'model.class_layers=2 is for images, which need model.patch_size; set '
      'that, or leave it out.',
    ),
    (
      {'talking_heads': True},
      'model.talking_heads=True is for images, which need model.patch_size; '
      'set that, or leave it out.',
    ),
    (
      {'patch_size': 4},
      'model.image_size=None must be divisible by model.patch_size=4; change '
      'one of them.',
    ),
    (
      {'patch_size': 4, 'image_size': 10},
      'model.image_size=10 must be divisible by model.patch_size=4; change one '
      'of them.',
    ),
    (
      {'patch_size': 4, 'image_size': 8},
      'model.causal=True is for text; with model.patch_size=4 set it to False.',
    ),
    (
      {**_IMAGES, 'num_token_types': 2},
      'model.num_token_types=2 is for text; with model.patch_size=4 set it to '
      '0.',
    ),
    (
      {**_IMAGES, 'positions': 'rotary'},
      'model.positions=rotary is for text; with model.patch_size=4 set it to '
      'learned.',
    ),
    (
      {**_IMAGES, 'max_positions': 64},
      'model.max_positions=64 is for text; images have a position for each '
      'patch, so leave it out.',
    ),
    (
      {'head_dim': 5},
      'Rotary positions need an even head size, got 5; set model.head_dim.',
    ),
  ],
)
def test_a_broken_rule_is_named(changes: dict[str, Any], message: str) -> None:
  with pytest.raises(ValueError) as caught:
    config.TransformerConfig(**changes).validate()
  assert str(caught.value) == message


def test_the_default_is_valid() -> None:
  config.TransformerConfig().validate()


def test_a_model_of_images_has_a_position_for_each_place() -> None:
  first = config.TransformerConfig(**_IMAGES)
  first.validate()
  assert first.sizes['positions'] == 5
  late = dataclasses.replace(first, class_layers=2)
  assert late.sizes['positions'] == 4
  assert late.sizes['pixels'] == 4 * 4 * 3


def test_learned_positions_allow_an_odd_head() -> None:
  config.TransformerConfig(head_dim=5, positions='learned').validate()


def test_sizes_left_out_follow_from_the_width() -> None:
  sizes = config.TransformerConfig(embed_dim=96, num_heads=6).sizes
  assert sizes['kv_heads'] == 6
  assert sizes['head_dim'] == 16
  assert sizes['mlp'] == 256


def test_an_ungated_mlp_is_four_times_as_wide() -> None:
  assert config.TransformerConfig(gated=False, embed_dim=96).sizes['mlp'] == 384


@pytest.mark.parametrize('embed_dim', [8, 64, 100, 4096])
def test_a_gated_mlp_costs_about_as_much_as_an_ungated_one(
  embed_dim: int,
) -> None:
  gated = config.TransformerConfig(embed_dim=embed_dim).sizes['mlp']
  assert gated % 32 == 0
  assert 0 <= 3 * gated - 8 * embed_dim < 3 * 32


def test_sizes_that_are_given_hold() -> None:
  sizes = config.TransformerConfig(num_kv_heads=2, head_dim=10, mlp_dim=7).sizes
  assert (sizes['kv_heads'], sizes['head_dim'], sizes['mlp']) == (2, 10, 7)


def test_configurations_are_keys_of_the_compilation_cache() -> None:
  small = config.TransformerConfig()
  assert hash(small) == hash(config.TransformerConfig())
  assert small != dataclasses.replace(small, num_layers=9)


def test_unused_rows_of_positions_need_a_table_of_them() -> None:
  learned = config.TransformerConfig(positions='learned', position_offset=2)
  learned.validate()
  assert learned.sizes['positions'] == learned.max_positions + 2
  with pytest.raises(ValueError, match=r"needs model\.positions='learned'"):
    dataclasses.replace(learned, positions='rotary').validate()
