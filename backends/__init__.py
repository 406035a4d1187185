"""Ports of the EDM2 specification. This file must exist: without it the folder ``torch`` could shadow the real one."""
