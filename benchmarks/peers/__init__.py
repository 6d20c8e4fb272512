"""`make bench-peers`: what a user would put around `WanPipeline` instead, beside this service, under the same traces.

`pipeline` and the three files beside it that end on `_peer` run in the peers' own processes; `contenders` starts them;
`traces` and `report` are pure; `run` is the command.
"""
