"""What bridges share. These files are no bridges: each file of ``adapters.bridges`` itself is one."""
