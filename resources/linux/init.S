# The init of the Linux guest: says that it is reached, then counts in memory and prints the count, five
# times a second, for ever.
        .intel_syntax noprefix
        .globl _start
        .data
text:   .ascii "tick "
digits: .ascii "00000000\n"
        .set text_bytes, . - text
hello:  .ascii "INIT-REACHED\n"
        .set hello_bytes, . - hello
        .balign 8
count:  .quad 0
pause:  .quad 0, 200000000
        .text
_start: mov eax, 1                      # write
        mov edi, 1
        lea rsi, hello[rip]
        mov edx, hello_bytes
        syscall
next:   inc qword ptr count[rip]
        mov rax, count[rip]
        lea rdi, digits[rip + 7]
        mov ecx, 8
        mov ebx, 10
digit:  xor edx, edx
        div rbx
        add dl, '0'
        mov [rdi], dl
        dec rdi
        dec ecx
        jnz digit
        mov eax, 1                      # write
        mov edi, 1
        lea rsi, text[rip]
        mov edx, text_bytes
        syscall
        mov eax, 35                     # nanosleep
        lea rdi, pause[rip]
        xor esi, esi
        syscall
        jmp next
