"""One dataclass per stage: its settings with their defaults. Lists are Hydra's, enums are in train.options."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from train.options import CacheGradient, EvaluationSize, Forcing, NoiseLevels, Optimizer, Schedule, Source, Weighting


@dataclass
class StageOptions:
    """What to do. kind: name of the stage."""

    kind: str = MISSING


@dataclass
class TrainingOptions(StageOptions):
    """What all training stages share. batch: clips (codec: frames) a process and micro-batch; accumulate: micro-batches a step.

    steps: default budget, replaced by the top-level ``steps=`` or ``minutes=``. clip: largest gradient norm. warmup: steps.
    ema: decay of the averaged weights (0 = none), updated every ema_every steps.
    """

    steps: int = 10_000
    batch: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    optimizer: Optimizer = Optimizer.adamw
    schedule: Schedule = Schedule.cosine
    warmup: int = 200
    clip: float = 1.0
    ema: float = 0.999
    ema_every: int = 4


@dataclass
class CodecStage(TrainingOptions):
    """Frame autoencoder. noise_std: latent noise while training. *_weight: L1, gradient L1, MSE and latent L2 terms."""

    kind: str = "codec"
    noise_std: float = 0.1
    l1_weight: float = 1.0
    gradient_weight: float = 1.0
    mse_weight: float = 1.0
    latent_weight: float = 1e-3
    scale_frames: int = 10_000


@dataclass
class FlowStage(TrainingOptions):
    """Flow matching on clips of latents. clip_frames T; shift of the training noise levels; action_dropout: probability.

    place_weight: for how many channels of the picture one of the place counts (with data.place_span).
    """

    clip_frames: int = 24
    noise_levels: NoiseLevels = NoiseLevels.shift
    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: Weighting = Weighting.none
    action_dropout: float = 0.1
    place_weight: float = 1.0


@dataclass
class TeacherStage(FlowStage):
    """Bidirectional, one noise level per clip."""

    kind: str = "teacher"


@dataclass
class ArDiffusionStage(FlowStage):
    """Teacher forcing. Context frames are noised in a share of the clips, and the network is told the level.

    context_noise_past: noised clips are like the past of a game with model.sampler.past_noise: real and clean up to a frame drawn
    evenly, from there on as if dreamed, all at one level, and none spared. (Behind noise little of what is seen is known but
    what led there: a network that has to go on from it learns the world, where one that sees the frame before learns to move
    it.)
    place_unknown_prob: share of the clips in whose context, up to that frame, nobody says where the player is, as in a game behind
    real pictures (with data.place_span).
    place_drift: how many frames, on average, lie from one right place of the past to the next (0: all are right; with
    data.place_span): in between x and y move by another share of what they should, and what is to be predicted goes on from the
    wrong place as it should. (Where the past
    is always right, what moved before says what moves next, and nobody learns it from the actions: in its own dreams, whose past
    such a network makes, it stands.)
    own_rounds: the context is made by the network itself 0 to own_rounds times over, evenly drawn per micro-batch (0 = never).
    forcing: diffusion = no clean half; a frame sees earlier noisy frames, each chunk with its own level.
    """

    kind: str = "ar_diffusion"
    forcing: Forcing = Forcing.teacher
    context_noise_prob: float = 0.5
    context_noise_max: float = 0.4
    context_noise_past: bool = False
    place_unknown_prob: float = 0.5
    place_drift: float = 0.0
    own_rounds: int = 0


@dataclass
class CausalCdStage(ArDiffusionStage):
    """Causal consistency distillation (arXiv 2605.15141).

    levels: N of the grid G(N, shift) that adjacent noise levels are taken from. guidance: scale of the teacher's classifier-free
    guidance against hidden actions (1 = none). target_decay: of the moving average that gives the target, updated after every step.
    """

    kind: str = "causal_cd"
    shift: float = 5.0
    levels: int = 48
    guidance: float = 1.0
    target_decay: float = 0.99
    action_dropout: float = 0.0
    context_noise_prob: float = 0.0


@dataclass
class TcmStage(CausalCdStage):
    """Truncated consistency (arXiv 2410.14895): only levels from `boundary` up are trained, below it the network
    that the run starts from (a finished causal_cd student) is kept as it is.

    boundary_prob: share of clips at the boundary itself, where the target is the frozen network; boundary_weight: of their loss.
    """

    kind: str = "tcm"
    boundary: float = 0.8
    boundary_prob: float = 0.25
    boundary_weight: float = 0.1


@dataclass
class CausalOdeStage(ArDiffusionStage):
    """Regression on stored teacher trajectories (arXiv 2602.02214). pairs: how many clips; levels: Euler steps N of a trajectory.

    list_steps: states are kept at the levels of a student of so many steps. guidance: of the teacher, against hidden actions.
    """

    kind: str = "causal_ode"
    shift: float = 5.0
    levels: int = 48
    list_steps: int = 4
    pairs: int = 2048
    guidance: float = 1.0
    action_dropout: float = 0.0
    context_noise_prob: float = 0.0


@dataclass
class ApexStage(ArDiffusionStage):
    """Condition-shifting self-adversarial training (arXiv 2604.12322); c_fake = scale * action + offset.

    mix: lambda, the share of the fake flow's prediction in the target. fake_weight, mix_weight: of the two losses.
    detach_fake: keep the gradient of the fake-flow loss out of the sample it is taken on.
    """

    kind: str = "apex"
    shift: float = 5.0
    condition_scale: float = -0.5
    condition_offset: float = 1.0
    mix: float = 0.5
    fake_weight: float = 1.0
    mix_weight: float = 1.0
    detach_fake: bool = False
    action_dropout: float = 0.0
    context_noise_prob: float = 0.0


@dataclass
class DmdStage(ArDiffusionStage):
    """Distribution matching (arXiv 2605.15141): ``init=`` is the student, ``teacher=`` a bidirectional run, which also starts the
    critic.

    student_steps: step counts the student is trained for, one drawn per update. first_steps: step count of a rollout's first chunk
    where that differs (0 = the same). critic_updates: critic steps per generator step. critic_lr: rate of the critic as a share of
    lr. guidance: of the teacher, against hidden actions (1 = none; the published "3.0" is 4 here). context_frames: real frames
    before the dream. rollout_frames: longest clip, context included; the scores see its last clip_frames. carry_on: rollouts go on
    from update to update until they are that long, clip_frames - context_frames at a time: long ones cost little more. score_min,
    score_max: range of the noise level that the scores are taken at.

    score: weight of distribution matching; 0 = none, and neither teacher nor critic, only the two regressions that follow.

    anchor: weight of a regression that is not in the paper: clean predictions from noised real clips, with the past that own_rounds
    makes, must stay near the real ones. (Scores alone say what looks right, not that it follows from the keys.)

    rest: weight of another one: where the recorded world stands still, because nobody acts or a wall is in the way, the rollout
    must, too (`rest_targets`). Without it the same small error is added to a resting view again and again. Not for videos, which
    move by themselves.
    rest_draws: of so many clips the one with the longest rest is what a rollout of the student's updates goes along; beside scores
    one rollout in four, which is then not scored.
    """

    kind: str = "dmd"
    shift: float = 5.0
    source: Source = Source.rollout
    cache_gradient: CacheGradient = CacheGradient.detached
    student_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    first_steps: int = 0
    critic_updates: int = 5
    critic_lr: float = 1.0
    guidance: float = 1.0
    context_frames: int = 8
    rollout_frames: int = 24
    carry_on: bool = False
    score_min: float = 0.02
    score_max: float = 0.98
    score: float = 1.0
    anchor: float = 0.0
    rest: float = 0.0
    rest_draws: int = 1
    action_dropout: float = 0.0
    context_noise_prob: float = 0.0


@dataclass
class SelfForcingStage(DmdStage):
    """Self Forcing (arXiv 2506.08009): pretrain_steps of regression on trajectories of the bidirectional teacher
    with a noisy context, then distribution matching on own rollouts. pairs, levels, list_steps, trajectory_guidance:
    see CausalOdeStage.
    """

    kind: str = "self_forcing"
    pretrain_steps: int = 1000
    pretrain_lr: float = 1.0
    levels: int = 48
    list_steps: int = 4
    pairs: int = 2048
    trajectory_guidance: float = 1.0


@dataclass
class CausvidStage(SelfForcingStage):
    """CausVid (arXiv 2412.07772): the same start, then distribution matching on noised data instead of rollouts."""

    kind: str = "causvid"
    source: Source = Source.noised
    forcing: Forcing = Forcing.diffusion


@dataclass
class AnyflowStage(DmdStage):
    """AnyFlow (arXiv 2605.13724): pretrain_steps of flow-map training on data, then on-policy distribution matching
    with flow-map jumps; student_steps are the step counts drawn there.

    map_guidance: w folded into the map (1 = none). fm_share, clean_share: of the clips, how many train r = t and r = 0.
    cotrain: keep the flow-map loss in the second phase.
    """

    kind: str = "anyflow"
    pretrain_steps: int = 2000
    pretrain_lr: float = 1.0
    student_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    critic_updates: int = 1
    map_guidance: float = 1.0
    fm_share: float = 0.5
    clean_share: float = 0.25
    cotrain: bool = True


STUDENTS = (CausalCdStage, CausalOdeStage, ApexStage, DmdStage)  # with all stages that derive from them


@dataclass
class EvaluateStage(StageOptions):
    """Rollouts of ``world=PATH`` against the real game; train.evaluate says what each number means.

    rollouts: held-out stretches. sampler_steps: denoising steps (0 = the world's default). step_counts: further counts, measured
    side by side in a compact way. size: how much is measured; random_frames: of random play, where the size's own number is not
    wanted (0). out: result folder ("" = the run folder).
    """

    kind: str = "evaluate"
    rollouts: int = 32
    sampler_steps: int = 0
    step_counts: list[int] = field(default_factory=list)
    size: EvaluationSize = EvaluationSize.full
    random_frames: int = 0
    out: str = ""


@dataclass
class AverageStage(StageOptions):
    """The mean of two students' weights: the world ``world=PATH`` with those of ``init=PATH``.

    share: of ``init``, from 0 (``world`` as it is) to 1.
    """

    kind: str = "average"
    share: float = 0.5
