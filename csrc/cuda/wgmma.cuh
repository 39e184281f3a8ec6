// wgmma with its first operand in registers, for each number of columns that kernels use.
#pragma once
