/* Where Firecracker enters a guest: 64-bit mode, the first GiB mapped to itself, rsi = boot_params. Maps 4 GiB (the
   devices lie above the first), takes a stack of its own, and goes on in C. */
    .section .text.start, "ax"
    .globl _start
_start:
    cli
    lea stack_top(%rip), %rsp
    /* PML4[0] -> PDPT, PDPT[0..4] -> four directories, each of 512 pages of 2 MiB. */
    lea pml4(%rip), %rdi
    lea pdpt(%rip), %rax
    or $3, %rax
    mov %rax, (%rdi)
    lea pdpt(%rip), %rdi
    lea directories(%rip), %rax
    or $3, %rax
    mov $4, %ecx
1:  mov %rax, (%rdi)
    add $8, %rdi
    add $4096, %rax
    dec %ecx
    jnz 1b
    lea directories(%rip), %rdi
    mov $0x83, %eax
    mov $2048, %ecx
2:  mov %rax, (%rdi)
    add $8, %rdi
    add $0x200000, %rax
    dec %ecx
    jnz 2b
    lea pml4(%rip), %rax
    mov %rax, %cr3
    /* boot_params.hdr.cmd_line_ptr (Linux x86 boot protocol, offset 0x228). */
    mov 0x228(%rsi), %edi
    call guest_main
3:  hlt
    jmp 3b

    .bss
    .balign 4096
pml4:        .skip 4096
pdpt:        .skip 4096
directories: .skip 16384
             .skip 8192
stack_top:
    .section .note.GNU-stack, "", @progbits
