"""The model on many devices: sharding rules, placing trees on a mesh, several processes, and the
collectives of compiled programs."""

from llama4_eqx.distributed.collectives import Collective as Collective
from llama4_eqx.distributed.collectives import collectives as collectives
from llama4_eqx.distributed.mesh_parallel import MeshParallel as MeshParallel
from llama4_eqx.distributed.processes import connect as connect
from llama4_eqx.distributed.rules import CONTEXT as CONTEXT
from llama4_eqx.distributed.rules import DATA as DATA
from llama4_eqx.distributed.rules import EXPERT_ALL_TO_ALL as EXPERT_ALL_TO_ALL
from llama4_eqx.distributed.rules import EXPERT_REPLICATED_TOKENS as EXPERT_REPLICATED_TOKENS
from llama4_eqx.distributed.rules import FSDP as FSDP
from llama4_eqx.distributed.rules import SEQUENCE as SEQUENCE
from llama4_eqx.distributed.rules import TENSOR as TENSOR
from llama4_eqx.distributed.rules import Rules as Rules
from llama4_eqx.distributed.rules import RulesLike as RulesLike
from llama4_eqx.distributed.sharding import abstract_sharded as abstract_sharded
from llama4_eqx.distributed.sharding import batch_sharding as batch_sharding
from llama4_eqx.distributed.sharding import device_put_global as device_put_global
from llama4_eqx.distributed.sharding import init_sharded as init_sharded
from llama4_eqx.distributed.sharding import shard as shard
from llama4_eqx.distributed.sharding import shardings as shardings
from llama4_eqx.distributed.sharding import unshard as unshard
from llama4_eqx.distributed.sharding import with_mesh as with_mesh
