"""The paper: pure functions of arrays that know no model and no environment."""
