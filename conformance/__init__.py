"""Proof that edm2_core is what edm2_core/SPEC.md says in every array library, and that a port of it agrees.

``pytest conformance`` runs it all; ``--hypothesis-profile ci`` with more examples, the same each time.
"""
