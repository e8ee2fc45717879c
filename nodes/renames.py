"""Nodes that had another id once, for workflows that still say it: ComfyUI replaces them as it reads the workflow."""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

__all__ = ["RENAMED", "register_renames"]

RENAMED: dict[str, str] = {}
"""Old id to today's, for nodes whose inputs kept their ids and order. A rename without an entry breaks workflows."""


async def register_renames(nodes: list[type[io.ComfyNode]]) -> None:
    """Says what replaces what, where ComfyUI takes it (0.3.64 does not); to be called from `on_load`."""
    if not hasattr(io, "NodeReplace"):
        return
    schemas = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes)}
    for old, new in RENAMED.items():
        inputs, outputs = schemas[new].inputs, range(len(schemas[new].outputs))
        await ComfyAPI().node_replacement.register(
            io.NodeReplace(
                new_node_id=new,
                old_node_id=old,
                old_widget_ids=[entry.id for entry in inputs if isinstance(entry, io.WidgetInput)],
                # Without these the server empties the node's inputs, and the page loses the links behind it.
                input_mapping=[{"new_id": entry.id, "old_id": entry.id} for entry in inputs],
                output_mapping=[{"new_idx": index, "old_idx": index} for index in outputs],
            )
        )
