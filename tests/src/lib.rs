//! The harness of salp's whole-system tests: colonies of real member processes, driven order by
//! order, judged by what each VM then sees.
//!
//! | module | what |
//! |---|---|
//! | [`world`] | a colony whose guests are puppets: stores, loads, forks, pins, ends |
//! | [`row`] | a row of the conformance table, run over points of its axes |
//! | [`failures`] | an operation, with each of its fallible steps failing once |
//! | [`hostile`] | what a fuzzer says to devices, loaders and the control socket |
//! | [`axes`] | the axes, and which points cover all pairs of their values |
//! | [`record`] | what a test says of its row, for the table |
//! | [`catalogue`], [`table`] | what the rows are, and the table that is made of the records |
//! | [`swap`] | a swap file, and pages sent there |
//! | [`dma`] | the DMA engine, driven by a puppet |
//! | [`images`] | kernels of a few instructions |
//! | [`user`] | a user of the commands |
//! | [`procs`] | processes, their descriptors, threads, mappings: what must not leak
//! | [`linux`] | Linux guests: their consoles, and when they said what |
//! | [`probe`] | what the host says of a member: frame numbers, descriptors, threads |
//!
//! Every test runs with both guests, see [`both_guests`]. Whatever is waited for is an event with a
//! time limit. A world that ends well has been checked, and has left nothing behind.

pub mod axes;
pub mod catalogue;
pub mod dma;
#[cfg(debug_assertions)]
pub mod failures;
pub mod hostile;
pub mod images;
pub mod linux;
pub mod procs;
pub mod probe;
pub mod record;
pub mod row;
pub mod swap;
pub mod table;
pub mod user;
pub mod world;

pub use salp::member::messages::GuestKind;

/// Makes of each function its tests, one for each guest: `name::kvm` and `name::thread`.
///
/// A function takes the test's name and the [`GuestKind`].
#[macro_export]
macro_rules! both_guests {
    ($($(#[$attribute:meta])* $name:ident;)*) => {$(
        mod $name {
            $(#[$attribute])*
            #[test]
            fn kvm() {
                $crate::record::of_test(
                    concat!(stringify!($name), "::kvm"),
                    $crate::GuestKind::Kvm,
                    super::$name,
                );
            }

            $(#[$attribute])*
            #[test]
            fn thread() {
                $crate::record::of_test(
                    concat!(stringify!($name), "::thread"),
                    $crate::GuestKind::Thread,
                    super::$name,
                );
            }
        }
    )*};
}
