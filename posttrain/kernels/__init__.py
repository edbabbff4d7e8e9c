"""The same numbers faster: each kernel has a switch that takes it out, and a test that holds it to the plain path.

Run that test after every change here. No other room depends on a kernel being used. fp8_linear alone gives other numbers, those
of rounded weights, and its test holds it to them.

    kernel         what it does                                          where                           switch
    nf4            holds weights in 4 bits and unpacks them when read    CPU, GPU; training, generating  quantization
    attention      attends by matrix products (CPU), or unpadded (GPU)   CPU, GPU; training              model.attn_implementation
    lora_linear    runs an adapted layer as one operation                CPU, GPU; training              fast_adapter
    lean_layers    computes again what is cheap instead of keeping it     CPU, GPU; training              lean_layers
    layer_graphs   replays the layers of a training step                 GPU; training                   layer_graphs
    liger          runs norm, rotary embedding and MLP as one each       GPU; training, generating       model.kernels
    decoding       does all of a decoding step but the products          GPU; generating                 model.decoding
    fp8_linear     holds a copy's weights in 8 bits                      GPU; GRPO's rollouts            rollouts.weights
    packed_linear  runs linear layers on weights that oneDNN packed      CPU; generating                 on for bf16 on a CPU
"""
