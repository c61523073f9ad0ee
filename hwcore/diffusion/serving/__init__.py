"""Serving in roles: what a diffusion scheduler mixes in to become one, and who starts them.

=============  ==========================================================================
module         what it holds
=============  ==========================================================================
`request`      what travels from role to role, and what each role builds anew of it
`ranks`        a request for every rank of a role that computes on several
`worker`       one role's work for the router: inputs loaded ahead, outputs pushed behind; `jobs`,
               `inputs`, `outputs`, `memory`, `spans` and `config` are its parts
`scheduler`    the mixin
=============  ==========================================================================
"""
