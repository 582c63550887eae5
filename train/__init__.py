"""The program that makes worlds: ``python -m train stage=NAME`` or ``experiment=NAME``. Nothing imports it.

Where to begin reading, in the order of a run:

- Settings: `__main__` is the door, `settings` what stands before Hydra. `config` holds the whole of the settings, `options` and
  `stage_options` its parts; `checks`, `stage_checks` and `explain` say what is wrong with them; `recipe` makes several runs of one
  experiment.
- A run: `jobs.run` -> `loop.fit`, the one loop (its parts: `state`, `optim`, `events`, `monitor`, `guards`, `distributed`), which
  asks a `stages.base.Stage` for losses. Stages: `codec`; `flow` and on it `teacher` and `ar_diffusion`; `distil` and on it the
  few-step students. `objectives` are their losses, `rollout` and `student` what they dream while they train.
- Data: `unpack` (episodes -> arrays) and `data` (clips, latents), opened by `latents`, with `place` (where the player is) if asked
  for; of videos `clips`, `prepare` (encodes them once) and `videos`. `made_once` holds how large files come about, `weights` and
  `export` read and write networks.
- Judging: `evaluate` and `evaluate_video`, what they measure in `examine` and `video_examine`; `report` lays runs side by side.
"""
