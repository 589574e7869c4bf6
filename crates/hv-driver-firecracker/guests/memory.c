/* What gcc may call by itself. */
#include "guest.h"

void *memset(void *to, int value, size_t length) {
    for (size_t i = 0; i < length; i++)
        ((volatile uint8_t *)to)[i] = (uint8_t)value;
    return to;
}

void *memcpy(void *to, const void *from, size_t length) {
    for (size_t i = 0; i < length; i++)
        ((volatile uint8_t *)to)[i] = ((const uint8_t *)from)[i];
    return to;
}
