"""Where islands stand and how long a packet takes between them."""

import dataclasses
import functools
import math

import numpy as np

_EARTH_RADIUS_KM = 6371.0
_SAME_CITY_SECS = 1e-3


@dataclasses.dataclass(frozen=True)
class City:
  """A place.

  Attributes:
    name: What it is called.
    latitude: Degrees north.
    longitude: Degrees east.
    region: Paths that stay in one region do not cross an ocean.
  """

  name: str
  latitude: float
  longitude: float
  region: str


_ALL = (
  City('Chicago', 41.9, -87.6, 'America'),
  City('Dallas', 32.8, -96.8, 'America'),
  City('Frankfurt', 50.1, 8.7, 'Europe'),
  City('Helsinki', 60.2, 24.9, 'Europe'),
  City('Johannesburg', -26.2, 28.0, 'Africa'),
  City('London', 51.5, -0.1, 'Europe'),
  City('Madrid', 40.4, -3.7, 'Europe'),
  City('Mumbai', 19.1, 72.9, 'Asia'),
  City('New York', 40.7, -74.0, 'America'),
  City('Osaka', 34.7, 135.5, 'Asia'),
  City('San Jose', 37.3, -121.9, 'America'),
  City('Sao Paulo', -23.6, -46.6, 'South America'),
  City('Singapore', 1.4, 103.8, 'Asia'),
  City('Sydney', -33.9, 151.2, 'Oceania'),
  City('Tokyo', 35.7, 139.7, 'Asia'),
  City('Toronto', 43.7, -79.4, 'America'),
  City('Washington', 38.9, -77.0, 'America'),
)
_BY_NAME = {city.name: city for city in _ALL}
# Averages that IBM Cloud published for 27 July to 25 August 2024.
_MEASURED_MS = {
  'Dallas': {
    'Toronto': 34,
    'Washington': 31,
    'Frankfurt': 123,
    'London': 113,
    'Madrid': 119,
    'Osaka': 150,
    'Tokyo': 143,
  },
  'Toronto': {
    'Washington': 19,
    'Frankfurt': 93,
    'London': 82,
    'Madrid': 108,
    'Osaka': 168,
    'Tokyo': 162,
  },
  'Washington': {
    'Frankfurt': 91,
    'London': 75,
    'Madrid': 87,
    'Osaka': 172,
    'Tokyo': 164,
  },
  'Frankfurt': {'London': 13, 'Madrid': 29, 'Osaka': 232, 'Tokyo': 233},
  'London': {'Madrid': 27, 'Osaka': 244, 'Tokyo': 243},
  'Madrid': {'Osaka': 257, 'Tokyo': 256},
  'Osaka': {'Tokyo': 9},
}


def find(text: str) -> City:
  """Finds a city by its name, or makes one from 'NAME:LATITUDE:LONGITUDE'.

  Raises:
    ValueError: If there is no such city and the text does not place one.
  """
  if text in _BY_NAME:
    return _BY_NAME[text]
  name, *numbers = text.split(':')
  try:
    latitude, longitude = (float(number) for number in numbers)
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
      raise ValueError(text)
  except ValueError:
    raise ValueError(
      f'City {text!r} must be one of {", ".join(_BY_NAME)} or be written '
      'NAME:LATITUDE:LONGITUDE in degrees.'
    ) from None
  here = City(name, latitude, longitude, '')
  nearest = min(_ALL, key=lambda city: distance_km(here, city))
  return dataclasses.replace(here, region=nearest.region)


def distance_km(a: City, b: City) -> float:
  """Along the great circle (haversine)."""
  lat_a, lat_b = math.radians(a.latitude), math.radians(b.latitude)
  half_lon = math.radians(b.longitude - a.longitude) / 2
  square = (
    math.sin((lat_b - lat_a) / 2) ** 2
    + math.cos(lat_a) * math.cos(lat_b) * math.sin(half_lon) ** 2
  )
  return 2 * _EARTH_RADIUS_KM * math.asin(math.sqrt(min(1.0, square)))


def round_trip_secs(a: City, b: City) -> float:
  """Measured where it was, else the distance times the usual delay.

  The usual delay is the median over the measured pairs. Between Europe and
  East Asia, where paths lead through America, it would be too small by a
  third; those pairs should be given where they matter.
  """
  if a == b:
    return _SAME_CITY_SECS
  measured = _MEASURED_MS.get(a.name, {}).get(b.name) or _MEASURED_MS.get(
    b.name, {}
  ).get(a.name)
  if measured:
    return measured / 1e3
  return max(_SAME_CITY_SECS, secs_per_km() * distance_km(a, b))


@functools.cache
def secs_per_km() -> float:
  """The median round trip of the measured pairs over their distance."""
  return float(
    np.median(
      [
        ms / 1e3 / distance_km(_BY_NAME[a], _BY_NAME[b])
        for a, others in _MEASURED_MS.items()
        for b, ms in others.items()
      ]
    )
  )
