-- Macros of every connection. DuckDB's own array functions (array_inner_product, array_cosine_similarity,
-- array_distance, …) work on `vec` as it is.

-- Unit i of a vector, counted from 0 as layers, positions and neurons are; DuckDB's own vec[i] counts from 1, and from
-- the end below 0. There is no vec[0]: NULL, as beyond the width.
CREATE MACRO unit(vec, i) AS vec[greatest(i + 1, 0)];

-- Euclidean norm of a vector.
CREATE MACRO norm(vec) AS sqrt(array_inner_product(vec, vec));
