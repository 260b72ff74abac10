//! Makes the conformance table: `conformance_table OUTPUT PAGE` reads the tests' output from one file
//! and writes the page. Fails if a row is missing.

use std::process::ExitCode;

use salp_tests::table::Table;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [output, page] = arguments.as_slice() else {
        eprintln!("usage: conformance_table OUTPUT PAGE");
        return ExitCode::from(2);
    };
    let result = std::fs::read_to_string(output).and_then(|output| {
        let table = Table::of(&output);
        let text = table.markdown();
        print!("{text}");
        std::fs::write(page, text)?;
        Ok((table.missing().join(" "), table.unknown().join(" ")))
    });
    match result {
        Ok((missing, unknown)) if missing.is_empty() && unknown.is_empty() => ExitCode::SUCCESS,
        Ok((missing, unknown)) => {
            eprintln!("rows that no test is for: {missing}; tests of unknown rows: {unknown}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{output} or {page}: {error}");
            ExitCode::FAILURE
        }
    }
}
