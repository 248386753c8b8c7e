"""What bridges share. Nothing here is a bridge: only the files of ``adapters.bridges`` itself are taken for one."""
