#!/usr/bin/env bash
# Trains and tests the networks of README.md on real cells; what is there is not done again. About 2 hours of two cores.
#
#     bash examples/cells/run.sh FOLDER && python examples/cells/tables.py FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
rat="{embed_dim: 32}"
deeper="{embed_dim: 32, depths: [2, 2, 6, 2]}"
layout="mlp_ratio: 3, block_types: attention, attn_kernel_size: 7, group_attn_width: coarse, stem_kernel_size: [3, 3]"
former="{embed_dim: 32, depths: [2, 3, 8, 3], stem_pool: false, $layout}"
none="{embed_dim: 32, depths: [2, 3, 8, 3], stem_pool: false, $layout, sga_attention_type: none}"
unet="{decoder_channels: [96, 64, 32, 16, 16]}"
volumes="{embed_dim: 32, depths: [2, 2, 4, 2], stem_stride: [1, 4, 4]}"

# run NAME SEED FACTORS ARGUMENTS...: trains for four epochs and tests at the factors of the pixel size
run() {
  local output=$folder/$1-$2 seed=$2 factors=$3
  [ -e "$output/test/all.csv" ] && return
  python examples/train.py --output "$output" --seed "$seed" --task instances --pretrained false --flip true \
    --crops 40 --epochs 4 --batch_size 4 --workers 0 --device cpu "${@:4}"
  # shellcheck disable=SC2086
  python examples/evaluate.py --trained "$output" --output "$output/test" --device cpu --factors $factors $resized
}

for seed in 0 1 2; do
  resized=--resized
  run hela-unet "$seed" "0.5 0.7 1 1.4 2" --data hela --model smp:unet-resnet10t --model_args "$unet"
  resized=''
  run hela-rat "$seed" "0.5 0.7 1 1.4 2" --data hela --model rat_tiny --model_args "$rat"
  run bacteria-rat "$seed" 1 --data bacteria --foreground 0.9 --gamma 2 --model rat_tiny --model_args "$rat"
  run bacteria-deeper "$seed" 1 --data bacteria --foreground 0.9 --gamma 2 --model rat_tiny --model_args "$deeper"
  run bacteria-unet "$seed" 1 --data bacteria --foreground 0.9 --gamma 2 --model smp:unet-resnet10t --model_args "$unet"
  run hela-deeper "$seed" "0.5 0.7 1 1.4 2" --data hela --model rat_tiny --model_args "$deeper"
  # what former versions had
  run hela-pixels "$seed" "0.5 0.7 1 1.4 2" --data hela --model rat_tiny --model_args "$deeper" --detail pixels
  run bacteria-pixels "$seed" 1 --data bacteria --foreground 0.9 --gamma 2 --model rat_tiny --model_args "$deeper" --detail pixels
  run hela-fpn "$seed" "0.5 0.7 1 1.4 2" --data hela --model rat_tiny --model_args "$former" --detail pixels
  run hela-groups "$seed" "0.5 0.7 1 1.4 2" --data hela --model rat_tiny --model_args "$former" --decoder groups --detail pixels
  run hela-none "$seed" "0.5 0.7 1 1.4 2" --data hela --model rat_tiny --model_args "$none" --detail pixels
  run bacteria-fpn "$seed" 1 --data bacteria --foreground 0.9 --gamma 2 --model rat_tiny --model_args "$former" --detail pixels
  run bacteria-nodetail "$seed" 1 --data bacteria --foreground 0.9 --gamma 2 --model rat_tiny --model_args "$former" --detail false
done
run cho-fpn 0 1 --data cho --model rat_tiny_3d --model_args "$volumes" --detail pixels --size "[5, 96, 96]" --crops 24 --batch_size 2
run bacteria-classes 0 1 --data bacteria --foreground 0.9 --task segmentation --model rat_tiny --model_args "$former" --detail pixels --epochs 2
for detector in fcos mask_rcnn; do
  run "hela-$detector" 0 1 --data hela --task detection --detector "$detector" --model rat_tiny --model_args "$former" \
    --epochs 3
done
