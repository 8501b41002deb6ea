"""What every command uses: files written whole, ranks, the console, the watchdog, data sheets of GPUs, the hub.

It may import kernels, mclr, models, configs, and of train: no other room of train/.
"""
