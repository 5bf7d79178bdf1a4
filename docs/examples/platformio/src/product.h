// What a product sets.
#pragma once

#define FIRMWARE_VERSION "1.0.0"  // as in `muster firmware sign --version`
#define HARDWARE "rev-a"          // as in `muster device`, for selectors of rollouts; may be empty
