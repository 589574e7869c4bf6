/* What every guest of the tests has: ports, the first serial port, the keyboard controller, the command line. Integer
   code only, no libc. */
#ifndef GUEST_H
#define GUEST_H

#include <stddef.h>
#include <stdint.h>

#define SERIAL 0x3f8
#define KEYBOARD_DATA 0x60
#define KEYBOARD 0x64

static inline void outb(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

static inline uint8_t inb(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void put(char letter) { outb(SERIAL, (uint8_t)letter); }

static inline void print(const char *text) {
    while (*text)
        put(*text++);
}

static inline void print_number(uint64_t number) {
    char digits[20];
    int length = 0;
    do
        digits[length++] = (char)('0' + number % 10);
    while (number /= 10);
    while (length)
        put(digits[--length]);
}

/* A line "name=number". */
static inline void report(const char *name, uint64_t number) {
    print(name);
    put('=');
    print_number(number);
    print("\r\n");
}

/* The next byte typed on the serial port; -1 if there is none (line status, bit 0: data ready). */
static inline int typed(void) { return inb(SERIAL + 5) & 1 ? inb(SERIAL) : -1; }

/* Whether ctrl-alt-del was pressed: its last scan code is e0 71 (set 2). */
static inline int asked_to_end(void) {
    static uint8_t last;
    while (inb(KEYBOARD) & 1) {
        uint8_t code = inb(KEYBOARD_DATA);
        if (last == 0xe0 && code == 0x71)
            return 1;
        last = code;
    }
    return 0;
}

/* Pulses the processor's reset line, which ends Firecracker with status 0. */
static inline void power_off(void) {
    for (;;)
        outb(KEYBOARD, 0xfe);
}

static inline int starts_with(const char *text, const char *prefix) {
    while (*prefix)
        if (*text++ != *prefix++)
            return 0;
    return 1;
}

/* Whether the command line has this word. */
static inline int has_word(const char *line, const char *word) {
    for (const char *at = line; *at; at++)
        if ((at == line || at[-1] == ' ') && starts_with(at, word))
            return 1;
    return 0;
}

/* gcc calls these for structures. */
void *memset(void *to, int value, size_t length);
void *memcpy(void *to, const void *from, size_t length);

void guest_main(const char *command_line);

#endif
