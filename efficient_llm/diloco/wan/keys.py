"""Who may talk to whom: an authority, the hub's certificate, islands' keys.

The hub shows a certificate that islands check against the authority's; an
island signs with its key, which the hub knows by its public half. No key of an
island has to travel: make it there and bring the hub the `.pub` file, or make
all here and give each island its own.
"""

import datetime
import ipaddress
import os
import pathlib
import re
import ssl
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import oid

AUTHORITY, CERTIFICATE, HUB_KEY = 'authority.pem', 'hub.pem', 'hub.key'
_AUTHORITY_KEY = 'authority.key'
_ISLANDS = 'islands'
_NAME = re.compile(r'[a-z0-9][a-z0-9-]{0,39}')
_LOCAL = ('localhost', '127.0.0.1', '::1')


def make(
  folder: pathlib.Path,
  *,
  hosts: Sequence[str],
  islands: Sequence[str],
  days: int = 365,
) -> list[pathlib.Path]:
  """Makes what is not there yet; what is there stays.

  Args:
    folder: Of the hub's: authority.pem is for every island as well.
    hosts: Names or addresses that islands call the hub by.
    islands: Names of islands that get a key.
    days: How long the hub's certificate is good; it is made anew each time.

  Returns:
    The islands' private keys that were made.

  Raises:
    ValueError: If a name will not do.
  """
  for name in islands:
    if not _NAME.fullmatch(name):
      raise ValueError(
        f'island {name!r} must be named in lower case letters, digits and -, '
        'such as paris-1.'
      )
  (folder / _ISLANDS).mkdir(parents=True, exist_ok=True)
  key, authority = _authority(folder)
  _hub_certificate(folder, key, authority, hosts=hosts, days=days)
  made = []
  for name in islands:
    path = folder / _ISLANDS / f'{name}.key'
    if not path.exists():
      _island_key(path)
      made.append(path)
  return made


def allowed(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Public keys of the islands that the hub lets in, by name."""
  return {path.stem: path for path in sorted((folder / _ISLANDS).glob('*.pub'))}


def public_bytes(path: pathlib.Path) -> bytes:
  """A public key as Flower compares it.

  Raises:
    ValueError: If the file is none.
  """
  key = serialization.load_ssh_public_key(path.read_bytes())
  return key.public_bytes(
    serialization.Encoding.PEM,
    serialization.PublicFormat.SubjectPublicKeyInfo,
  )


def check_hub(folder: pathlib.Path) -> None:
  """Refuses a folder that a hub cannot start with.

  Raises:
    ValueError: Naming what is missing or out of date.
  """
  for name in (AUTHORITY, CERTIFICATE, HUB_KEY):
    if not (folder / name).is_file():
      raise ValueError(
        f'--keys={folder} must hold {name}; make it by python -m '
        'experiments.island_keys.'
      )
  if not allowed(folder):
    raise ValueError(
      f'--keys={folder} must hold a key in {_ISLANDS}; make one by python -m '
      'experiments.island_keys --islands=NAME.'
    )
  certificate = x509.load_pem_x509_certificate(
    (folder / CERTIFICATE).read_bytes()
  )
  end = certificate.not_valid_after_utc
  if end < datetime.datetime.now(datetime.UTC):
    raise ValueError(
      f'{folder / CERTIFICATE} is out of date since {end:%Y-%m-%d}; make it '
      'anew by python -m experiments.island_keys.'
    )


def client_context(authority: pathlib.Path) -> ssl.SSLContext:
  """How an island checks the hub.

  Raises:
    ValueError: If the file is no certificate.
  """
  try:
    return ssl.create_default_context(cafile=os.fspath(authority))
  except OSError as error:
    raise ValueError(
      f'--authority={authority} must be the authority.pem of the hub: '
      f'{error.strerror or error}.'
    ) from error


def _authority(
  folder: pathlib.Path,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
  key_path, path = folder / _AUTHORITY_KEY, folder / AUTHORITY
  if key_path.exists() and path.exists():
    key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
      raise ValueError(f'{key_path} must be a key made here; remove it.')
    return key, x509.load_pem_x509_certificate(path.read_bytes())
  key = ec.generate_private_key(ec.SECP384R1())
  name = _common_name('efficient_llm islands')
  certificate = (
    _builder(name, name, key.public_key(), days=3650)
    .add_extension(x509.BasicConstraints(True, 0), critical=True)
    .add_extension(
      x509.KeyUsage(True, False, False, False, False, True, True, False, False),
      critical=True,
    )
    .sign(key, hashes.SHA384())
  )
  _write_private(key_path, _pem(key))
  path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
  return key, certificate


def _hub_certificate(
  folder: pathlib.Path,
  authority_key: ec.EllipticCurvePrivateKey,
  authority: x509.Certificate,
  *,
  hosts: Sequence[str],
  days: int,
) -> None:
  key = ec.generate_private_key(ec.SECP384R1())
  names = [_subject_name(host) for host in dict.fromkeys([*hosts, *_LOCAL])]
  certificate = (
    _builder(
      _common_name('efficient_llm hub'),
      authority.subject,
      key.public_key(),
      days=days,
    )
    .add_extension(x509.SubjectAlternativeName(names), critical=False)
    .add_extension(x509.BasicConstraints(False, None), critical=True)
    .add_extension(
      x509.AuthorityKeyIdentifier.from_issuer_public_key(
        authority_key.public_key()
      ),
      critical=False,
    )
    .sign(authority_key, hashes.SHA384())
  )
  _write_private(folder / HUB_KEY, _pem(key))
  (folder / CERTIFICATE).write_bytes(
    certificate.public_bytes(serialization.Encoding.PEM)
  )


def _island_key(path: pathlib.Path) -> None:
  key = ec.generate_private_key(ec.SECP384R1())
  _write_private(
    path,
    key.private_bytes(
      serialization.Encoding.PEM,
      serialization.PrivateFormat.OpenSSH,
      serialization.NoEncryption(),
    ),
  )
  path.with_suffix('.pub').write_bytes(
    key.public_key().public_bytes(
      serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    + b'\n'
  )


def _builder(
  subject: x509.Name,
  issuer: x509.Name,
  public_key: ec.EllipticCurvePublicKey,
  *,
  days: int,
) -> x509.CertificateBuilder:
  now = datetime.datetime.now(datetime.UTC)
  # A clock that is a little late must not refuse it; nor one already past.
  start = now - datetime.timedelta(days=2 + max(0, -days))
  return (
    x509.CertificateBuilder()
    .subject_name(subject)
    .issuer_name(issuer)
    .public_key(public_key)
    .serial_number(x509.random_serial_number())
    .not_valid_before(start)
    .not_valid_after(now + datetime.timedelta(days=days))
    .add_extension(
      x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False
    )
  )


def _common_name(text: str) -> x509.Name:
  return x509.Name([x509.NameAttribute(oid.NameOID.COMMON_NAME, text)])


def _subject_name(host: str) -> x509.GeneralName:
  try:
    return x509.IPAddress(ipaddress.ip_address(host))
  except ValueError:
    return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
  return key.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
  )


def _write_private(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that only this user reads, from its first byte on."""
  path.unlink(missing_ok=True)
  descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
  with os.fdopen(descriptor, 'wb') as file:
    file.write(content)
