import pytest

from efficient_llm.models import presets, transformer


@pytest.mark.parametrize(
  ('name', 'published'),
  [
    ('gpt2', 124_439_808),
    ('gpt2_medium', 354_823_168),
    ('bert_base', 109_514_298),
    ('llama_1b', 1_235_814_400),
    ('llama_8b', 8_030_261_248),
    ('qwen3_600m', 596_049_920),
    ('qwen3_1_7b', 1_720_574_976),
    ('deit_small', 22_050_664),
    ('deit_base', 86_567_656),
  ],
)
def test_a_published_model_has_the_published_count(
  name: str, published: int
) -> None:
  assert transformer.num_params(presets.get(name)) == published


@pytest.mark.parametrize(
  ('name', 'size', 'millions', 'giga_products'),
  [
    # Touvron et al. 2021, CaiT, table 3; the counts in full are timm's.
    ('cait_xs24', 384, 26.67, 19.3),
    ('cait_s24', 224, 46.92, 9.4),
    ('cait_s24', 384, 47.06, 32.2),
    # Touvron et al. 2021, DeiT, tables 1 and 5.
    ('deit_small', 224, 22.05, 4.6),
    ('deit_base', 224, 86.57, 17.6),
  ],
)
def test_a_published_model_of_images_costs_what_was_published(
  name: str, size: int, millions: float, giga_products: float
) -> None:
  model = presets.get(name, image_size=size)
  assert transformer.num_params(model) / 1e6 == pytest.approx(
    millions, abs=0.005
  )
  # Multiplications of a forward pass, with norms and biases counted there.
  assert transformer.flops_per_image(model) / 6e9 == pytest.approx(
    giga_products, rel=0.01
  )


@pytest.mark.parametrize('name', presets.PRESETS)
def test_every_preset_is_valid(name: str) -> None:
  presets.get(name).validate()


@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('ladder_200k', 2e5),
    ('ladder_1m', 1e6),
    ('ladder_5m', 5e6),
    ('ladder_10m', 1e7),
    ('ladder_30m', 3e7),
    ('llama_350m', 3.5e8),
  ],
)
def test_a_preset_has_about_the_count_in_its_name(
  name: str, count: float
) -> None:
  num_params = transformer.num_params(presets.get(name), embeddings=False)
  assert num_params == pytest.approx(count, rel=0.15)


def test_a_preset_can_be_changed() -> None:
  changed = presets.get('gpt2', num_layers=3)
  assert changed.num_layers == 3
  assert changed.embed_dim == presets.get('gpt2').embed_dim


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
  with pytest.raises(ValueError, match=r"^Unknown model preset 'gpt9'") as info:
    presets.get('gpt9')
  for name in presets.PRESETS:
    assert str(info.value).count(f'{name}') >= 1
