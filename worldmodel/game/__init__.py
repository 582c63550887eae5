"""The window: events in, pictures out. Knows worlds only by their face (`worldmodel.world.World`); never imports torch.

Where to begin reading: `app.play` runs with a window or without. Two threads meet in `generator`: its own asks whoever drives
(`run.Seat`: a person by `input`, an agent of `agents`) for an action, steps the world and hands pictures to `delivery`; the main
one (`loop`) takes them out and shows them (`view`, `window`), and what a person does besides playing is in `shell` and `presence`.
What is written down: `journal`, `replay`, `recording`, `stats`.
"""
