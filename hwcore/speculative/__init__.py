"""Tree speculation that any device can run: build the tree, verify it, commit the accepted path.

The parts are plain torch on whatever device the arguments live on. None of them reads a device
value on the host, so each can be captured in a graph and queued behind the forward pass.

Terms: a request's *tree* has ``N`` nodes, its *root* being the token that the last step emitted;
``W = spec_steps + 1`` bounds the path that one step can accept. Everywhere -1 means "none".
"""

from hwcore.speculative.batch import VerifyBatch, VerifyStep
from hwcore.speculative.cache_locs import cache_locs
from hwcore.speculative.chain import verify_chain
from hwcore.speculative.coins import CoinPurpose, block_positions, draw_coins
from hwcore.speculative.commit import CommitResult, commit
from hwcore.speculative.draft_results import DraftResults, organize_draft_results
from hwcore.speculative.draft_sampling import sample_drafts
from hwcore.speculative.drafts import Beam, DraftSteps
from hwcore.speculative.inputs import verify_slots
from hwcore.speculative.kv import move_kv
from hwcore.speculative.likeliest import top_k
from hwcore.speculative.mrope import MropeContext, compute_spec_mrope_positions
from hwcore.speculative.processors import HostLogitProcessor, WalkedRows
from hwcore.speculative.sampling import verify_sampling
from hwcore.speculative.sampling_params import SamplingParams
from hwcore.speculative.tree import DraftTree, TreeMaskMode, build_tree
from hwcore.speculative.tree_costs import measure_costs
from hwcore.speculative.tree_size import TreeSizer
from hwcore.speculative.verify import VerifyResult, VerifyStatus, verify_greedy
from hwcore.speculative.worker import EagleVerifyWorker

__all__ = [
    "Beam",
    "CoinPurpose",
    "CommitResult",
    "DraftResults",
    "DraftSteps",
    "DraftTree",
    "EagleVerifyWorker",
    "HostLogitProcessor",
    "MropeContext",
    "SamplingParams",
    "TreeMaskMode",
    "TreeSizer",
    "VerifyBatch",
    "VerifyResult",
    "VerifyStatus",
    "VerifyStep",
    "WalkedRows",
    "block_positions",
    "build_tree",
    "cache_locs",
    "commit",
    "compute_spec_mrope_positions",
    "draw_coins",
    "measure_costs",
    "move_kv",
    "organize_draft_results",
    "sample_drafts",
    "top_k",
    "verify_chain",
    "verify_greedy",
    "verify_sampling",
    "verify_slots",
]
