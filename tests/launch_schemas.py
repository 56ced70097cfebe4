"""What schedulers take, from their documentation, and a check against it.

A schema is a type, a set of allowed values, a list with the schema of each
item, or a mapping of names to schemas, in which '*' stands for any name. Names
that a mapping does not have are errors, as they are to the schedulers.
"""

from collections.abc import Iterator
from typing import Any

_TEXTS = {'*': str}
_POD = {
  'restartPolicy': {'Never', 'OnFailure'},
  'terminationGracePeriodSeconds': int,
  'hostNetwork': bool,
  'dnsPolicy': {'ClusterFirst', 'ClusterFirstWithHostNet', 'Default', 'None'},
  'securityContext': {'runAsUser': int, 'runAsGroup': int, 'fsGroup': int},
  'nodeSelector': _TEXTS,
  'containers': [
    {
      'name': str,
      'image': str,
      'command': [str],
      'args': [str],
      'ports': [{'containerPort': int}],
      'resources': {'limits': {'google.com/tpu': int, 'nvidia.com/gpu': int}},
      'volumeMounts': [{'name': str, 'mountPath': str}],
    }
  ],
  'volumes': [
    {
      'name': str,
      'csi': {'driver': str, 'volumeAttributes': _TEXTS},
      'emptyDir': {'medium': {'', 'Memory'}},
    }
  ],
}
_JOB = {
  'parallelism': int,
  'completions': int,
  'completionMode': {'Indexed', 'NonIndexed'},
  'backoffLimit': int,
  'podFailurePolicy': {
    'rules': [
      {
        'action': {'FailJob', 'FailIndex', 'Ignore', 'Count'},
        'onExitCodes': {
          'containerName': str,
          'operator': {'In', 'NotIn'},
          'values': [int],
        },
        'onPodConditions': [
          {'type': str, 'status': {'True', 'False', 'Unknown'}}
        ],
      }
    ]
  },
  'template': {'metadata': {'annotations': _TEXTS}, 'spec': _POD},
}
# jobset.x-k8s.io/v1alpha2, batch/v1 and v1, as far as they are used.
JOBSET = {
  'apiVersion': {'jobset.x-k8s.io/v1alpha2'},
  'kind': {'JobSet'},
  'metadata': {'name': str, 'annotations': _TEXTS},
  'spec': {
    'network': {'enableDNSHostnames': bool, 'subdomain': str},
    'failurePolicy': {
      'maxRestarts': int,
      'restartStrategy': {'Recreate', 'BlockingRecreate', 'InPlaceRestart'},
      'rules': [
        {
          'name': str,
          'action': {
            'FailJobSet',
            'RestartJobSet',
            'RestartJobSetAndIgnoreMaxRestarts',
          },
          'onJobFailureReasons': [
            {
              'BackoffLimitExceeded',
              'DeadlineExceeded',
              'FailedIndexes',
              'MaxFailedIndexesExceeded',
              'PodFailurePolicy',
            }
          ],
          'targetReplicatedJobs': [str],
        }
      ],
    },
    'replicatedJobs': [
      {'name': str, 'replicas': int, 'template': {'spec': _JOB}}
    ],
  },
}
# SkyPilot's task YAML, as far as it is used.
TASK = {
  'name': str,
  'num_nodes': int,
  'workdir': str,
  'resources': {
    'accelerators': str,
    'accelerator_args': {'runtime_version': str, 'tpu_vm': bool},
    'zone': str,
    'use_spot': bool,
    'image_id': str,
    'job_recovery': {
      'strategy': {'FAILOVER', 'EAGER_NEXT_REGION'},
      'max_restarts_on_errors': int,
      'recover_on_exit_codes': [int],
    },
  },
  'file_mounts': {
    '*': {'source': str, 'mode': {'MOUNT', 'COPY', 'MOUNT_CACHED'}}
  },
  'setup': str,
  'run': str,
}
# Options of sbatch, and what their values look like.
SBATCH = {
  'job-name': r'\S+',
  'nodes': r'\d+(-\d+)?',
  'ntasks-per-node': r'\d+',
  'gpus-per-node': r'([a-z]\w*:)?\d+',
  'cpus-per-gpu': r'\d+',
  'exclusive': r'|user|mcs',
  'mem': r'\d+[KMGT]?',
  'partition': r'[\w,-]+',
  'time': r'(\d+-)?\d+:\d\d:\d\d',
  'signal': r'(R?B?:)?[A-Z0-9]+(@\d{1,5})?',
  'requeue': r'',
  'open-mode': r'append|truncate',
  'output': r'(%[jxANt]|[\w./-])+',
}
_PLACE = {'zone', 'project'}
# Options of gcloud and xpk, by file and by the words before them.
OPTIONS = {
  'tpu_vm.sh': {
    'queue create': {
      'accelerator-type', 'runtime-version', 'node-id', 'node-count',
      'node-prefix', 'spot', *_PLACE,
    },
    'queue describe': {'format', *_PLACE},
    'queue delete --force': {'quiet', 'async', *_PLACE},
    'queued-resources scp': {'node', 'worker', *_PLACE},
  },
  'xpk.sh': {
    'xpk storage attach': {
      'type', 'bucket', 'mount-point', 'readonly', 'size', 'auto-mount',
      'cluster', *_PLACE,
    },
    'xpk workload create': {
      'workload', 'tpu-type', 'num-slices', 'docker-image', 'max-restarts',
      'restart-on-user-code-failure', 'termination-grace-period-seconds',
      'priority', 'command', 'cluster', *_PLACE,
    },
  },
}  # fmt: skip


def errors(tree: Any, schema: Any, path: str = '') -> list[str]:
  """What does not fit, one line each, beginning with where."""
  return list(_errors(tree, schema, path))


def _errors(tree: Any, schema: Any, path: str) -> Iterator[str]:
  if isinstance(schema, type):
    # A bool is an int to Python and not to a scheduler.
    if type(tree) is not schema:
      yield f'{path}: {tree!r} is not {schema.__name__}'
  elif isinstance(schema, set):
    if not isinstance(tree, str) or tree not in schema:
      yield f'{path}: {tree!r} is not one of {sorted(schema)}'
  elif isinstance(schema, list):
    if not isinstance(tree, list) or not tree:
      yield f'{path}: {tree!r} is not a list'
      return
    for index, item in enumerate(tree):
      yield from _errors(item, schema[0], f'{path}[{index}]')
  elif not isinstance(tree, dict) or not tree:
    yield f'{path}: {tree!r} is not a mapping'
  else:
    for name, value in tree.items():
      place = f'{path}.{name}' if path else name
      if name in schema or '*' in schema:
        yield from _errors(value, schema.get(name, schema.get('*')), place)
      else:
        yield f'{place}: is not known'
