"""The papers that this package builds on: what is here of each, what checks it, and what is left out on purpose."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAPERS", "Paper"]


@dataclass(frozen=True)
class Paper:
    """One paper.

    Attributes
    ----------
    title : str
        Its name, as short as it is known by.
    source : str
        Where it is: arXiv, or the repository whose code was read.
    here : tuple of str
        What this package has of it: ``operator NAME``, ``claim NAME``, or a module or name below ``refattn``.
    checks : tuple of str
        The test files below ``tests/`` that hold it, besides those that run over all operators and all claims.
    peer : str
        Which implementations of others it was compared with, by ;: packages whose tests are among `checks`, and
        releases that were run by hand. "" for none that could be had.
    not_here : str
        What is left out, and why.
    """

    title: str
    source: str
    here: tuple[str, ...]
    checks: tuple[str, ...]
    peer: str
    not_here: str


TRAINING = "its training and accuracies, which need its data and models"
PAPERS = (
    Paper(
        "FlashAttention",
        "arXiv 2205.14135",
        ("operator block_sparse", "functions.costs.flash_io", "claim flash-io", "claim flash-io-lower", "gpu"),
        (
            "functions/costs/test_words.py",
            "theory/test_flash_io.py",
            "gpu/test_attention.py",
            "peers/test_references.py",
            "peers/test_transformers.py",
            "peers/test_xformers.py",
        ),
        "PyTorch; transformers; xformers; for speed FlashAttention-3 and cuDNN (docs/gpu.md)",
        "dropout; the theorem of its lower bound is a claim with constants of ours",
    ),
    Paper(
        "HyperAttention",
        "arXiv 2310.05869",
        ("operator hyper", "functions.hyper", "claim hyper-unbiased", "claim hyper-spectral"),
        ("variants/test_pooled.py", "functions/test_hyper.py", "theory/test_hyper.py"),
        "its release, run beside it once",
        "the zero padding of its release; " + TRAINING,
    ),
    Paper(
        "SSA, with NSA and MoBA",
        "arXiv 2511.20102, 2502.11089, 2502.13189",
        (
            "operator nsa",
            "operator nsa_selected",
            "operator moba",
            "functions.alignment",
            "functions.native",
            "claim sparse-alignment",
        ),
        (
            "variants/test_nsa.py",
            "variants/test_selected.py",
            "functions/test_alignment.py",
            "functions/test_native.py",
            "peers/test_fla.py",
            "peers/test_nsa.py",
        ),
        "fla-core's naive NSA; native-sparse-attention-pytorch; MoBA's release, run beside it once",
        "NSA's learned compression; " + TRAINING,
    ),
    Paper(
        "DeepSeek sparse attention",
        "arXiv 2512.02556 (recalled)",
        ("operator dsa", "functions.native.indexer_scores", "functions.native.indexer_select"),
        ("variants/test_selected.py", "functions/test_native.py"),
        "",
        "rotary positions and norms inside the indexer, which come before the call; its training",
    ),
    Paper(
        "DeepSeek-V2, latent attention",
        "arXiv 2405.04434 (recalled)",
        ("functions.latent",),
        ("functions/test_latent.py",),
        "",
        "the projections that make the latent; " + TRAINING,
    ),
    Paper(
        "EcoFormer",
        "arXiv 2209.09004",
        ("operator ecoformer", "functions.hashing", "functions.costs.ecoformer_operations", "claim ecoformer-energy"),
        ("variants/test_ecoformer.py", "functions/test_hashing.py", "functions/costs/test_operations.py"),
        "its release, run beside it once; no package has it",
        TRAINING,
    ),
    Paper(
        "SeerAttention",
        "github microsoft/SeerAttention",
        ("operator seer", "functions.gates"),
        ("variants/test_seer.py", "functions/test_gates.py"),
        "",
        "its kernels; batches of variable lengths; " + TRAINING,
    ),
    Paper(
        "SpecKV and SpecPC",
        "github furiosa-ai/draft-based-approx-llm",
        ("functions.eviction",),
        ("functions/test_eviction.py", "peers/test_kvpress.py"),
        "SpecKV's release, run beside it once; kvpress's SnapKV",
        "the vertical-slash prefill; drafts, which are language models",
    ),
    Paper(
        "Combiner",
        "arXiv 2107.05768",
        ("functions.combiner", "functions.costs.combiner_fixed", "claim combiner-support"),
        ("functions/test_combiner.py", "functions/costs/test_operations.py"),
        "",
        "the row-major axial form, whose layer has learned weights",
    ),
    Paper(
        "ProxyAttn",
        "no code was seen",
        ("functions.budgets",),
        ("functions/test_budgets.py",),
        "",
        "its sizes, which were not published in what was read",
    ),
    Paper(
        "Spark Transformer",
        "arXiv 2506.06644",
        ("operator spark", "functions.statistical"),
        ("variants/test_pooled.py", "functions/test_statistical.py", "peers/test_gemma.py"),
        "transformers' Gemma 3n",
        TRAINING,
    ),
    Paper(
        "RetrievalAttention and RetroInfer",
        "arXiv 2409.10516, 2505.02922",
        ("functions.retrieval", "functions.indexes"),
        ("functions/test_retrieval.py", "functions/test_indexes.py"),
        "faiss",
        "indexes of millions of keys, and a cache that moves between devices",
    ),
    Paper(
        "PowerAttention",
        "arXiv 2503.03588",
        ("operator power_blocks", "claim power-attention-reach", "claim block-reach"),
        ("variants/test_shapes.py",),
        "",
        "which layers are full is the model's to choose (`theory.reach.of_layers`); " + TRAINING,
    ),
    Paper(
        "Kinetics",
        "arXiv 2506.05333",
        (
            "operator topk",
            "functions.sampling",
            "functions.costs.topk_decoding",
            "claim kinetics-crossover",
            "claim kinetics-keys",
        ),
        ("variants/test_selected.py", "functions/test_sampling.py", "functions/costs/test_decoding.py"),
        "its release's cost model, run beside it once",
        "accuracies",
    ),
    Paper(
        "Routing Transformer",
        "arXiv 2003.05997",
        ("functions.clusters", "functions.costs.routing_operations"),
        ("functions/test_clusters.py", "functions/costs/test_operations.py", "peers/test_routing.py"),
        "routing-transformer",
        TRAINING,
    ),
    Paper(
        "Lightning Attention and TransNormer",
        "arXiv 2401.04658",
        (
            "operator lightning",
            "claim lightning-chunks",
            "claim lightning-powers",
            "functions.transnormer",
            "functions.positions.lightning_slopes",
        ),
        (
            "variants/test_shapes.py",
            "peers/test_fla.py",
            "functions/test_transnormer.py",
            "functions/test_positions.py",
        ),
        "fla-core's naive simple_gla",
        TRAINING,
    ),
    Paper(
        "Neighborhood attention",
        "arXiv 2204.07143, 2209.15001, 2504.16922",
        ("operator neighborhood",),
        ("variants/test_shapes.py", "peers/test_natten.py"),
        "natten, which is its release",
        TRAINING,
    ),
    Paper(
        "Titans",
        "arXiv 2501.00663",
        ("operator titans", "operator titans_mac", "functions.memory"),
        (
            "variants/test_titans.py",
            "variants/test_shapes.py",
            "peers/test_titans.py",
            "functions/test_memory.py",
            "peers/test_fla.py",
        ),
        "titans-pytorch; fla-core's step, which lacks parentheses",
        "the norms and the residual inside its release's memory; " + TRAINING,
    ),
    Paper(
        "LargeGT",
        "arXiv 2312.11109",
        ("operator codebook", "functions.codebook", "functions.neighbours"),
        ("variants/test_pooled.py", "functions/test_codebook.py", "functions/test_neighbours.py"),
        "PyTorch's BatchNorm1d, for its norm",
        TRAINING,
    ),
    Paper(
        "MPNN and graph transformers",
        "arXiv 2301.11956",
        ("functions.virtual_node", "claim virtual-node-linear", "claim virtual-node-wide", "claim virtual-node-deep"),
        ("functions/test_virtual_node.py",),
        "",
        "benchmarks on molecules",
    ),
    Paper(
        "Distribution Transformers",
        "github GWhittle110/distribution-transformers",
        ("functions.mixtures", "functions.mixture_model"),
        ("functions/test_mixtures.py", "functions/test_mixture_model.py"),
        "",
        "priors that are no Gaussian mixtures; sensor fusion on its data",
    ),
    Paper(
        "LAS-Diffusion",
        "github Zhengxinyang/LAS-Diffusion",
        ("operator view_local",),
        ("variants/test_view_local.py",),
        "its release's masks, run beside it once",
        "the diffusion model",
    ),
    Paper(
        "UQAC",
        "github Yinghao-Li/UQAC",
        ("functions.chain",),
        ("functions/test_chain.py",),
        "its release, run beside it once",
        "the filter by hidden states; calibration of language models",
    ),
    Paper(
        "Transformers as Decision Makers",
        "arXiv 2310.08566",
        (
            "operator relu",
            "functions.in_context",
            "functions.in_context_planning",
            "claim decisions-linucb",
            "claim decisions-thompson",
            "claim decisions-ucb-vi",
            "claim decisions-regret",
        ),
        ("functions/test_in_context.py", "functions/test_in_context_planning.py", "theory/test_bandits.py"),
        "",
        "pretraining and its generalisation",
    ),
    Paper(
        "StreetMath",
        "github ctseng777/StreetMath",
        ("functions.diagnostics",),
        ("functions/test_diagnostics.py",),
        "its release, run beside it once",
        "language models; these are diagnostics, not attention",
    ),
    Paper(
        "CRATE",
        "arXiv 2306.01129",
        ("functions.crate", "claim crate-gradient", "claim crate-ista"),
        ("functions/test_crate.py", "theory/test_crate.py"),
        "its release, run beside it once; no package has it",
        TRAINING,
    ),
    Paper(
        "Universal approximation by a single layer",
        "arXiv 2507.10581",
        ("claim single-layer-universal", "claim boltzmann-gap"),
        ("theory/test_claims.py",),
        "",
        "the paper's own construction: its abstract was read, the construction is ours",
    ),
    Paper(
        "OAT",
        "github HKUST-NISL/oat_eccv24",
        ("functions.scanpath",),
        ("functions/test_scanpath.py",),
        "",
        "the networks and the metrics of gaze",
    ),
    Paper(
        "Efficient Probing",
        "github billpsomas/efficient-probing",
        ("functions.probing", "claim probing-folding"),
        ("functions/test_probing.py",),
        "its release and SimPool's, run beside it once",
        TRAINING,
    ),
    Paper(
        "URPE",
        "arXiv 2205.13401",
        ("operator urpe", "claim rpe-constant", "claim urpe-position", "functions.toeplitz"),
        ("variants/test_urpe.py", "functions/test_toeplitz.py"),
        "its release at 47b711f, run beside it once",
        "buckets of distances; " + TRAINING,
    ),
    Paper(
        "CARVE",
        "github YuyaoGe/CARVE",
        ("functions.maps",),
        ("functions/test_maps.py",),
        "its release at a1f0442, run beside it once",
        "the vision-language models; cropping and asking again",
    ),
    Paper(
        "Attention, state spaces and recurrences as dynamical systems",
        "arXiv 2405.15731",
        ("functions.systems", "claim systems-recurrence", "claim systems-selective"),
        ("functions/test_systems.py",),
        "",
        "MQAR's training",
    ),
    Paper(
        "Tensor attention",
        "arXiv 2310.04064",
        ("tensor", "claim match3-pairwise", "claim bounded-near-linear", "claim bounded-folds"),
        ("tensor/test_tensor.py", "tensor/test_match3.py"),
        "",
        "higher orders than triples in the exact form",
    ),
    Paper(
        "Power-Softmax",
        "arXiv 2410.09457",
        ("operator power", "he", "claim power-softmax", "claim power-softmax-range"),
        ("he/test_circuit.py", "he/test_plan.py"),
        "TenSEAL's CKKS vectors, by a benchmark (docs/he.md)",
        "bootstrapping; the paper's models",
    ),
)
