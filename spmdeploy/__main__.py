from spmdeploy.cli import entry

entry()
