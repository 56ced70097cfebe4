"""A JobSet for Google Kubernetes Engine: one job for each slice."""

import json

from experiments.launch import docker, template
from experiments.launch import job as job_lib

FILE = 'gke.yaml'

_JOBSET = """\
# kubectl apply --filename=@{file}; needs JobSet 0.7 or later in the cluster.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: @{name}
@{annotations}
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: @{max_restarts}
    # Two generations must never write to the same folder.
    restartStrategy: BlockingRecreate
    rules:
      # Stopped and saved (see podFailurePolicy): no failure, begin again.
      - name: stopped
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: @{num_slices}
      template:
        spec:
          parallelism: @{nodes_per_slice}
          completions: @{nodes_per_slice}
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: worker
                  operator: In
                  values: [3]
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
                    status: "True"
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              # Between SIGTERM and the end, for the checkpoint.
              terminationGracePeriodSeconds: @{grace_secs}
@{host_network}
              securityContext:
                runAsUser: @{uid}
                runAsGroup: @{uid}
                fsGroup: @{uid}
@{selector}
              containers:
                - name: worker
                  image: @{image}
                  command: [bash, -c]
                  args:
                    - @{worker}
@{ports}
@{resources}
                  volumeMounts:
                    - name: bucket
                      mountPath: @{mount}
                    - name: memory
                      mountPath: /dev/shm
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: @{bucket}
                      mountOptions: @{mount_options}
                - name: memory
                  emptyDir:
                    medium: Memory
"""
_TPUS = {
  'v5e': 'tpu-v5-lite-podslice',
  'v5p': 'tpu-v5p-slice',
  'v6e': 'tpu-v6e-slice',
}
_GPUS = {
  'a100': 'nvidia-a100-80gb',
  'h100': 'nvidia-h100-80gb',
  'h200': 'nvidia-h200-141gb',
}


def render(job: job_lib.Job) -> dict[str, str]:
  """Gives the files by name."""
  machines = job.machines
  is_tpu = machines.platform == 'tpu'
  selector, resources, ports, annotations, host_network = [], '', '', '', ''
  if is_tpu:
    selector = [
      f'cloud.google.com/gke-tpu-accelerator: {_TPUS[machines.chip]}',
      f'cloud.google.com/gke-tpu-topology: {machines.shape}',
    ]
    resources = _limits('google.com/tpu', machines.devices_per_node)
    # A slice's hosts find each other here; see the cloud's documentation.
    ports = 'ports:\n  - containerPort: 8471\n  - containerPort: 8482'
    annotations = (
      'annotations:\n  alpha.jobset.sigs.k8s.io/exclusive-topology: '
      'cloud.google.com/gke-nodepool'
    )
  elif machines.platform == 'gpu':
    selector = [f'cloud.google.com/gke-accelerator: {_GPUS[machines.chip]}']
    resources = _limits('nvidia.com/gpu', machines.devices_per_node)
    ports = f'ports:\n  - containerPort: {job_lib.PORT}'
  if job.spot:
    selector.append('cloud.google.com/gke-spot: "true"')
  if machines.num_slices > 1:
    # Slices talk over the hosts' own network, not that of the pods.
    host_network = 'hostNetwork: true\ndnsPolicy: ClusterFirstWithHostNet'
  worker = ' && '.join(job_lib.worker_lines(job, coordinates=_coordinates(job)))
  text = template.fill(
    _JOBSET,
    file=FILE,
    name=job.name,
    annotations=_indent(annotations, 2),
    max_restarts=job.max_restarts,
    num_slices=machines.num_slices,
    nodes_per_slice=machines.nodes_per_slice,
    grace_secs=job.grace_secs,
    host_network=_indent(host_network, 14),
    uid=job_lib.UID,
    selector=_indent(_mapping('nodeSelector', selector), 14),
    image=json.dumps(job.image),
    # Kubernetes fills in $(NAME) by itself.
    worker=json.dumps(worker.replace('$(', '$$(')),
    ports=_indent(ports, 18),
    resources=_indent(resources, 18),
    mount=job_lib.MOUNT,
    bucket=json.dumps((job.bucket or '').removeprefix('gs://')),
    mount_options=json.dumps(
      f'implicit-dirs,rename-dir-limit=200000,uid={job_lib.UID},'
      f'gid={job_lib.UID}'
    ),
  )
  return {**docker.dockerfile(job), FILE: text}


def _coordinates(job: job_lib.Job) -> str:
  """How GPU processes find each other; TPU hosts are told by the cloud."""
  if job.machines.platform == 'tpu':
    return ''
  return (
    f'--coordinator={job.name}-workers-0-0.{job.name}:{job_lib.PORT} '
    f'--num_processes={job.machines.num_nodes} '
    '--process_id="$JOB_COMPLETION_INDEX"'
  )


def _limits(name: str, count: int) -> str:
  return f'resources:\n  limits:\n    {name}: {count}'


def _indent(text: str, width: int) -> str:
  return '\n'.join(' ' * width + line for line in text.splitlines())


def _mapping(name: str, lines: list[str]) -> str:
  if not lines:
    return ''
  return '\n'.join([f'{name}:', *(f'  {line}' for line in lines)])
