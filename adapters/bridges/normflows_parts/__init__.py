"""What the bridge of normflows is made of. Its files import normflows: the bridge imports them when it is given one.

``layers`` has one layer of normflows as an nflows transform, ``corrections`` the layers that are wrong by themselves,
and ``models`` the whole models with their bases.
"""
