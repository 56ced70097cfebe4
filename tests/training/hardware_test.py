import types

import jax
import pytest

from efficient_llm.training import hardware


def _device(kind, platform='gpu', process_index=0):
  return types.SimpleNamespace(
    device_kind=kind, platform=platform, process_index=process_index
  )


@pytest.mark.parametrize(
  ('device_kind', 'name'),
  [
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6 lite', 'v6e'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200'),
  ],
)
def test_a_chip_is_found_under_the_name_jax_reports(device_kind, name):
  chip = hardware.chip_for(device_kind)
  assert chip is not None
  assert chip.name == name


@pytest.mark.parametrize('kind', ['NVIDIA H100 PCIe', 'TPU v99', 'cpu', ''])
def test_a_board_with_other_figures_is_not_taken_for_a_known_chip(kind):
  assert hardware.chip_for(kind) is None


@pytest.mark.parametrize('chip', hardware.CHIPS.values(), ids=lambda c: c.name)
def test_memory_is_the_fastest_way_to_move_bytes(chip):
  assert chip.hbm_bytes_per_sec > chip.interconnect_bytes_per_sec
  assert chip.interconnect_bytes_per_sec > chip.network_bytes_per_sec > 0


@pytest.mark.parametrize('chip', hardware.CHIPS.values(), ids=lambda c: c.name)
def test_float32_is_never_faster_than_the_matrix_units(chip):
  assert (chip.float32_flops_per_sec or 0) < chip.matmul_flops_per_sec


def test_utilisation_at_half_the_published_peak_of_all_devices_is_half():
  devices = [_device('NVIDIA H200')] * 8
  assert hardware.mfu(4 * 989.4e12, devices) == pytest.approx(0.5)


def test_utilisation_of_an_unknown_accelerator_is_not_made_up():
  devices = [_device('NVIDIA H200'), _device('Mystery 9000')]
  assert hardware.mfu(1e12, devices) is None


def test_simulated_devices_of_one_cpu_count_once():
  one = hardware.peak_flops([_device('cpu', 'cpu')])
  many = hardware.peak_flops([_device('cpu', 'cpu')] * 8)
  assert one == many
  assert one is not None
  assert one.origin == 'measured'


def test_the_cpu_is_measured_once_and_is_faster_than_a_billion_a_second():
  first = hardware.measured_peak_flops()
  assert first > 1e9
  assert hardware.measured_peak_flops() == first


def test_the_devices_here_have_a_utilisation_on_a_cpu():
  devices = jax.devices('cpu')
  assert hardware.mfu(hardware.measured_peak_flops(), devices) == 1.0


def test_no_devices_are_refused():
  with pytest.raises(ValueError, match='devices must not be empty'):
    hardware.peak_flops([])
